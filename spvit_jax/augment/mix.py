"""Augmentation of whole batches on the device, inside the jitted step: erasing, MixUp, CutMix.

The host crops, resizes and augments single images (`data/crops.py`, `data/augmentation.py`) and
sends uint8. `BatchTransform` then normalises, erases and mixes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from spvit_jax.errors import InputError

_ERASE_ATTEMPTS = 10  # timm's
_ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
_ERASED_RATIO = (0.3, 1 / 0.3)  # height over width


@dataclasses.dataclass(frozen=True)
class BatchTransform:
    """Augmentation and normalisation of a training batch; every augmentation is off by default.

    Attributes:
      mean: mean of each channel, for pixels from 0 to 1.
      std: standard deviation of each channel, likewise.
      erase: probability of filling a random box with noise.
      mixup: α of MixUp; 0 is off.
      cutmix: α of CutMix; 0 is off.
      mix_probability: probability of mixing a group at all.
      switch_probability: probability of CutMix rather than MixUp where both are on.
      mix_group_size: number of images that are mixed with each other, by one draw.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    switch_probability: float = 0.5
    mix_group_size: int = 128

    @classmethod
    def of(cls, config: ConfigDict) -> Self:
        """Returns the batch transform of a configuration."""
        augment = config.augment
        return cls(
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            erase=augment.erase,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            mix_probability=augment.mix_probability,
            switch_probability=augment.switch_probability,
            mix_group_size=augment.mix_group_size,
        )

    @jax.named_scope("augment")
    def __call__(
        self, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Normalises, erases and mixes a batch of images, and mixes its targets.

        Args:
          images: uint8 [B, h, w, 3].
          targets: [B, C] class probabilities.
          key: a random key.

        Returns:
          Images float32 [B, h, w, 3] and targets [B, C].
        """
        erase_key, mix_key = jax.random.split(key)
        images = self.normalize(images)
        if self.erase:
            images = erase(images, jax.random.split(erase_key, len(images)), self.erase)
        return mix(
            images,
            targets,
            mix_key,
            mixup=self.mixup,
            cutmix=self.cutmix,
            probability=self.mix_probability,
            switch_probability=self.switch_probability,
            group_size=self.mix_group_size,
        )

    @jax.named_scope("normalize")
    def normalize(self, images: jax.Array) -> jax.Array:
        """Returns images of 0 to 255 normalised, float32; evaluation does nothing else."""
        return normalize(images, self.mean, self.std)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns images [B, h, w, 3] of 0 to 255 as float32, less the mean and divided by the std.

    `mean` and `std` are per channel, for pixels on a scale of 0 to 1.
    """
    offset, scale = 255 * jnp.array(mean), 255 * jnp.array(std)
    return (images.astype(jnp.float32) - offset) / scale


def erase(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Fills a random box of some images with noise (random erasing, arXiv 1708.04896).

    The box has 2% to a third of the image's area and a height over width of 0.3 to 3.3, as in
    timm; of ten draws the first that fits is taken.

    Args:
      images: normalised images [B, h, w, 3] float.
      keys: random keys [B].
      probability: probability of erasing a box of an image.

    Returns:
      Images of the same shape, with pixels drawn from a normal distribution in the box.
    """

    def erase_box(image: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 6)
        h, w = image.shape[:2]
        draws = (_ERASE_ATTEMPTS,)
        area = h * w * jax.random.uniform(keys[0], draws, jnp.float32, *_ERASED_AREA)
        log_ratio = (math.log(ratio) for ratio in _ERASED_RATIO)
        ratio = jnp.exp(jax.random.uniform(keys[1], draws, jnp.float32, *log_ratio))
        rows, columns = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        fits = (rows < h) & (columns < w)
        is_first = fits & (jnp.cumsum(fits) == 1)
        rows, columns = (jnp.where(is_first, x, 0).sum() for x in (rows, columns))
        top = jnp.floor(jax.random.uniform(keys[2]) * (h - rows + 1))
        left = jnp.floor(jax.random.uniform(keys[3]) * (w - columns + 1))
        y, x = jnp.arange(h)[:, None, None], jnp.arange(w)[None, :, None]
        box = (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)
        chosen = jax.random.bernoulli(keys[4], probability) & fits.any()
        return jnp.where(box & chosen, jax.random.normal(keys[5], image.shape), image)

    return jax.vmap(erase_box)(images, keys)


def mix(
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    group_size: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Mixes groups of images with themselves in reverse order, each by MixUp or by CutMix.

    Args:
      images: [B, h, w, 3] float.
      targets: [B, C] class probabilities.
      key: a random key.
      mixup: α of MixUp (arXiv 1710.09412), λ ~ Beta(α, α); 0 is off.
      cutmix: α of CutMix (arXiv 1905.04899); 0 is off.
      probability: probability of mixing a group at all.
      switch_probability: probability of CutMix rather than MixUp where both are on.
      group_size: number of images for which all this is drawn once, as timm draws it for each
        GPU; B where there are fewer.

    Returns:
      Images and targets of the same shapes.
    """
    if not mixup and not cutmix:
        return images, targets
    shape = images.shape[1], images.shape[2]
    groups = _count_groups(len(images), group_size)
    keys = jax.random.split(key, 5)
    cutmix_probability = _cutmix_probability(mixup, cutmix, switch_probability)
    use_cutmix = jax.random.bernoulli(keys[0], cutmix_probability, (groups,))[:, None, None]
    use_either = jax.random.bernoulli(keys[1], probability, (groups,))[:, None, None]
    blended = _draw_beta(keys[2], mixup, groups)[:, None, None]
    boxes = jax.vmap(lambda key, keep: random_box(key, shape, keep))(
        jax.random.split(keys[4], groups), _draw_beta(keys[3], cutmix, groups)
    )
    # The weight [groups, h, w] of each pixel's own image.
    kept = jnp.where(use_either, jnp.where(use_cutmix, ~boxes, blended), 1)

    def with_partner(x: jax.Array, kept: jax.Array) -> jax.Array:
        """Mixes x [B, ...] with its partners by weights `kept` [groups, ...], which broadcast."""
        grouped = x.reshape(groups, -1, *x.shape[1:])
        kept = kept[:, None]
        return (kept * grouped + (1 - kept) * grouped[:, ::-1]).reshape(x.shape)

    # A box at the border is smaller than drawn, so that the targets' weight is the mean pixel's.
    return with_partner(images, kept[..., None]), with_partner(targets, kept.mean((1, 2))[:, None])


@jax.named_scope("mix_tokens")
def mix_tokens(patches: jax.Array, key: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Replaces a box of each image's patches by its partner's (MixToken, arXiv 2104.10858).

    Args:
      patches: embedded patches [B, h, w, D], as the stem returns them.
      key: a random key.
      group_size: number of images that have the same box and are paired with each other in
        reverse order; B where there are fewer.

    Returns:
      The mixed patches [B, h, w, D]; and bool [B, h, w], true where they are the partner's.
    """
    groups = _count_groups(len(patches), group_size)
    keep_key, box_key = jax.random.split(key)
    keep = jax.random.uniform(keep_key, (groups,))
    grid = patches.shape[1], patches.shape[2]
    boxes = jax.vmap(lambda key, keep: random_box(key, grid, keep))(
        jax.random.split(box_key, groups), keep
    )
    boxes = jnp.repeat(boxes, len(patches) // groups, axis=0)
    return jnp.where(boxes[..., None], partners(patches, group_size), patches), boxes


def check_group_size(config: ConfigDict) -> None:
    """Raises an `InputError` if batches cannot be divided into the groups that are mixed.

    MixUp and CutMix mix a batch before it is divided into micro-batches, MixToken each micro-batch.
    """
    augment, batch_size = config.augment, config.data.batch_size
    group_size = augment.mix_group_size
    sizes = [batch_size] if augment.mixup or augment.cutmix else []
    if augment.mix_token:
        sizes.append(batch_size // config.optim.accumulate)
    if sizes and group_size < 1:
        raise InputError(f"augment.mix_group_size is {group_size}; expected at least one image")
    for size in sizes:
        if size > group_size and size % group_size:
            raise InputError(
                f"augment.mix_group_size is {group_size}, which does not divide the {size} "
                "images of a batch (or of a micro-batch); choose one that does"
            )


def partners(x: jax.Array, group_size: int) -> jax.Array:
    """Returns the partners [B, ...] that MixToken pairs examples with: each group reversed."""
    groups = _count_groups(len(x), group_size)
    return x.reshape(groups, -1, *x.shape[1:])[:, ::-1].reshape(x.shape)


def random_box(key: jax.Array, shape: tuple[int, int], keep: jax.Array) -> jax.Array:
    """Returns the mask [h, w] bool of a random CutMix box, true inside.

    The box covers the fraction 1 - keep of the image's area, around a uniform centre, and is
    clipped at the border.
    """
    side = jnp.sqrt(1 - keep)

    def inside(key: jax.Array, length: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, length)
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        position = jnp.arange(length)
        return (position >= centre - half) & (position < centre + half)

    key_y, key_x = jax.random.split(key)
    return inside(key_y, shape[0])[:, None] & inside(key_x, shape[1])[None, :]


def _cutmix_probability(mixup: float, cutmix: float, switch_probability: float) -> float:
    if mixup and cutmix:
        return switch_probability
    return 1.0 if cutmix else 0.0


def _draw_beta(key: jax.Array, alpha: float, count: int) -> jax.Array:
    """Draws [count] values of Beta(α, α), or returns ones where α is 0."""
    if not alpha:
        return jnp.ones(count)
    draws = jax.random.beta(key, alpha, alpha, (count,))
    if jax.sharding.get_abstract_mesh().empty:
        return draws
    # Whole on each device: XLA would split the loop that rejects draws, and its devices would
    # have to agree at every turn.
    return jax.lax.with_sharding_constraint(draws, PartitionSpec())


def _count_groups(batch_size: int, group_size: int) -> int:
    return max(batch_size // group_size, 1)
