"""What is done to a whole batch, on the device and inside the jitted step.

Normalising, MixUp and CutMix on float images; the host sends uint8. What is done to one image is
in `augment.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps uint8 images [B, h, w, 3] to float32, subtracting the mean and dividing by the std.

    `mean` and `std` are per channel, for pixels on a scale of 0 to 1.
    """
    offset, scale = 255 * jnp.array(mean), 255 * jnp.array(std)
    return (images.astype(jnp.float32) - offset) / scale


def mix(
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Mixes a batch with itself in reverse order, by MixUp or by CutMix.

    Args:
      images: [B, h, w, 3] float.
      targets: [B, C] class probabilities.
      key: a random key.
      mixup: α of MixUp (arXiv 1710.09412), λ ~ Beta(α, α); 0 is off.
      cutmix: α of CutMix (arXiv 1905.04899); 0 is off.
      probability: of mixing at all.
      switch_probability: of CutMix rather than MixUp where both are on.

    Returns:
      Images and targets of the same shapes.
    """
    if not mixup and not cutmix:
        return images, targets
    keys = jax.random.split(key, 5)
    use_cutmix = jax.random.bernoulli(keys[0], _cutmix_share(mixup, cutmix, switch_probability))
    use_either = jax.random.bernoulli(keys[1], probability)
    reversed_images, reversed_targets = images[::-1], targets[::-1]

    mixup_share = jax.random.beta(keys[2], mixup, mixup) if mixup else jnp.float32(1)
    blended = mixup_share * images + (1 - mixup_share) * reversed_images

    cutmix_share = jax.random.beta(keys[3], cutmix, cutmix) if cutmix else jnp.float32(1)
    box = random_box(keys[4], (images.shape[1], images.shape[2]), cutmix_share)
    pasted = jnp.where(box[None, :, :, None], reversed_images, images)

    # The targets' weight is the box's real share: a box at the border is smaller than drawn.
    share = jnp.where(use_cutmix, 1 - box.mean(), mixup_share)
    mixed = jnp.where(use_cutmix, pasted, blended)
    mixed_targets = share * targets + (1 - share) * reversed_targets
    return (
        jnp.where(use_either, mixed, images),
        jnp.where(use_either, mixed_targets, targets),
    )


def random_box(key: jax.Array, shape: tuple[int, int], keep: jax.Array) -> jax.Array:
    """Draws CutMix's box: around a uniform centre, of the share 1 - keep, cut at the border.

    Returns a mask [h, w] bool, true inside the box.
    """
    side = jnp.sqrt(1 - keep)

    def inside(key: jax.Array, length: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, length)
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        position = jnp.arange(length)
        return (position >= centre - half) & (position < centre + half)

    key_y, key_x = jax.random.split(key)
    return inside(key_y, shape[0])[:, None] & inside(key_x, shape[1])[None, :]


def _cutmix_share(mixup: float, cutmix: float, switch_probability: float) -> float:
    if mixup and cutmix:
        return switch_probability
    return 1.0 if cutmix else 0.0
