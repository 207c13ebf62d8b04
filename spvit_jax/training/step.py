"""The train step and the eval step, as pure functions of their arguments."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from spvit_jax.augment import mix
from spvit_jax.augment.label_maps import align
from spvit_jax.augment.mix import BatchTransform
from spvit_jax.models import Model, Outputs
from spvit_jax.models.spatial import Grid
from spvit_jax.training import losses
from spvit_jax.training.state import METRICS, Metrics, TrainState, Variables

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Static settings of the train step and the eval step.

    Attributes:
      num_classes: number of classes, C.
      transform: normalisation, erasing and mixing of a batch.
      loss: training loss.
      label_smoothing: fraction of a target that is spread over all classes.
      dense_weight: weight of the dense head's loss.
      grid: grid of the tokens to which label maps are aligned; None without label maps.
      official_axes: whether label maps exchange x and y where SP-ViT's authors' code does.
      mix_token: number of images that share a box of MixToken; 0 for off.
      accumulate: number of micro-batches per step.
      ema: decay of the moving average; 0 for off.
    """

    num_classes: int
    transform: BatchTransform
    loss: losses.Loss = losses.classification_loss
    label_smoothing: float = 0.0
    dense_weight: float = 1.0
    grid: Grid | None = None
    official_axes: bool = False
    mix_token: int = 0
    accumulate: int = 1
    ema: float = 0.0

    @classmethod
    def of(cls, config: ConfigDict, num_classes: int, grid: Grid | None = None) -> StepSettings:
        """Returns the settings of a configuration.

        Args:
          config: resolved configuration.
          num_classes: number of classes, C.
          grid: grid of the model's tokens where there are label maps; else None.
        """
        return cls(
            num_classes=num_classes,
            transform=BatchTransform.of(config),
            loss=losses.find_loss(config.loss.name),
            label_smoothing=config.loss.label_smoothing,
            dense_weight=config.loss.dense_weight,
            grid=grid,
            official_axes=config.token_labels.official_axes,
            mix_token=config.augment.mix_group_size if config.augment.mix_token else 0,
            accumulate=config.optim.accumulate,
            ema=config.optim.ema,
        )


class ClassCounts(NamedTuple):
    """Numbers of examples by class, int32.

    Attributes:
      confusion: [C, C], of each label (rows) with each most probable class (columns).
      top5: [C], of each label that is among the five most probable classes.
    """

    confusion: jax.Array
    top5: jax.Array


def key_for(root: jax.Array, name: str, step: jax.Array) -> jax.Array:
    """Returns the random key of a named use at a step: a function of its arguments alone."""
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    teacher: Variables | None = None,
    *,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
) -> TrainState:
    """Takes one step of training.

    Args:
      state: train state before the step; donated when jitted.
      batch: `image` uint8 [B, h, w, 3] and `label` int32 [B]; with label maps also `label_map`,
        `box`, `flip` and, with RandAugment, `move`, as `pipeline.train_batches` makes them.
      rng: the run's root key, the same at every step.
      teacher: model whose predictions a distillation token learns, or None.
      optimizer: optimizer from `make_optimizer`.
      settings: static settings of the step.

    Returns:
      The state after the step, with the step's metrics added to its sums.
    """
    labels = losses.smooth_labels(batch["label"], settings.num_classes, settings.label_smoothing)
    images, labels = settings.transform(batch["image"], labels, key_for(rng, "mix", state.step))
    targets = losses.Targets(labels)
    if "label_map" in batch and settings.grid is not None:
        dense, whole = align(
            batch["label_map"],
            batch["box"],
            batch["flip"],
            settings.grid,
            settings.num_classes,
            moves=batch.get("move"),
            smoothing=settings.label_smoothing,
            official_axes=settings.official_axes,
        )
        targets = losses.Targets(whole, dense=dense)
    if teacher is not None:
        logits = teacher.model().outputs(images).evaluation_logits()
        targets = targets.replace(distilled=losses.hard_labels(logits))
    grads, stats, metrics = _gradients(
        state.model, images, targets, key_for(rng, "drop_path", state.step), settings
    )
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model.params)
        params = optax.apply_updates(state.model.params, updates)
    model = state.model.replace(params=params, stats=stats)
    with jax.named_scope("ema"):
        ema = state.ema and optax.incremental_update(model, state.ema, 1 - settings.ema)

    step = state.step + 1
    metrics["grad_norm"] = (optax.tree.norm(grads), jnp.float32(1))
    # The norm stands for the whole gradient, and for Adam's moments, which square it too.
    watched = (metrics["loss"], metrics["grad_norm"], stats)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(watched)]).all()
    is_first_nan = ~finite & (state.nan_step < 0)
    return TrainState(
        step=step,
        model=model,
        ema=ema,
        opt_state=opt_state,
        metrics=jax.tree.map(jnp.add, state.metrics, {name: metrics[name] for name in METRICS}),
        nan_step=jnp.where(is_first_nan, step, state.nan_step),
    )


def eval_step(model: Variables, batch: Batch, *, settings: StepSettings) -> Metrics:
    """Evaluates a model on one batch.

    Args:
      model: weights to evaluate.
      batch: `image` uint8 [B, h, w, 3], `label` int32 [B] and `mask` float32 [B], 0 for padding.
        Labels may be uint8 [B, C], 1 for each that is right (ImageNet-ReaL, arXiv 2006.07159);
        an image without any does not count.
      settings: static settings of the step; only its normalisation is used.

    Returns:
      (sum, count) of `loss` (cross-entropy with the label, or with all right ones evenly), `top1`
      and `top5`; and of `nonfinite`, whether an image's logits or its loss are not finite numbers.
    """
    return _metrics(_evaluation_logits(model, batch, settings), batch)


def class_step(
    model: Variables, batch: Batch, *, settings: StepSettings
) -> tuple[Metrics, ClassCounts]:
    """Evaluates a model on one batch as `eval_step`, and counts by class what it says.

    Labels are int32 [B].
    """
    logits = _evaluation_logits(model, batch, settings)
    labels, counted = batch["label"], batch["mask"].astype(jnp.int32)
    best = _most_probable(logits)
    classes = settings.num_classes
    counts = ClassCounts(
        confusion=jnp.zeros((classes, classes), jnp.int32).at[labels, best[:, 0]].add(counted),
        top5=jnp.zeros(classes, jnp.int32)
        .at[labels]
        .add(counted * (best == labels[:, None]).any(axis=1)),
    )
    return _metrics(logits, batch), counts


def _evaluation_logits(model: Variables, batch: Batch, settings: StepSettings) -> jax.Array:
    images = settings.transform.normalize(batch["image"])
    return model.model().outputs(images).evaluation_logits()


def _most_probable(logits: jax.Array) -> jax.Array:
    """Returns the numbers int32 [B, 5] of the five most probable classes, or of all fewer."""
    return jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]


def _metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """Returns the metrics of `eval_step` for logits [B, C]."""
    labels, mask = batch["label"], batch["mask"]
    best = _most_probable(logits)
    if labels.ndim == 1:
        ranked = best == labels[:, None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        ranked = jnp.take_along_axis(labels, best, axis=1) > 0
        right = labels.sum(axis=1, keepdims=True, dtype=jnp.float32)
        loss = optax.softmax_cross_entropy(logits, labels / jnp.maximum(right, 1))
        mask = mask * (right[:, 0] > 0)
    nonfinite = ~(jnp.isfinite(logits).all(axis=1) & jnp.isfinite(loss))
    values = {
        "loss": loss,
        "top1": ranked[:, 0],
        "top5": ranked.any(axis=1),
        "nonfinite": nonfinite,
    }
    count = mask.sum()
    return {name: ((value * mask).sum(), count) for name, value in values.items()}


def _gradients(
    model: Variables,
    images: jax.Array,
    targets: losses.Targets,
    key: jax.Array,
    settings: StepSettings,
) -> tuple[nnx.State, nnx.State, Metrics]:
    """Returns the mean gradient over the batch, BatchNorm's new statistics, and metrics.

    The batch is split into `accumulate` micro-batches, taken in order; BatchNorm normalises within
    each.
    """

    def loss_fn(
        params: nnx.State,
        stats: nnx.State,
        images: jax.Array,
        targets: losses.Targets,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[nnx.State, jax.Array]]:
        module = model.replace(params=params, stats=stats).model(train=True)
        outputs, targets = _outputs(module, images, targets, key, settings)
        loss = settings.loss(outputs, targets, settings.dense_weight)
        correct = outputs.evaluation_logits().argmax(-1) == targets.label.argmax(-1)
        return loss, (nnx.state(module, nnx.Not(nnx.Param)), correct.sum())

    def accumulate(carry: Any, micro: Any) -> tuple[Any, None]:
        grads, stats, loss, correct = carry
        images, targets, index = micro
        (new_loss, (stats, new_correct)), new_grads = jax.value_and_grad(loss_fn, has_aux=True)(
            model.params, stats, images, targets, jax.random.fold_in(key, index)
        )
        grads = jax.tree.map(jnp.add, grads, new_grads)
        return (grads, stats, loss + new_loss, correct + new_correct), None

    parts = settings.accumulate
    count = jnp.float32(images.shape[0])
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    carry = (zeros, model.stats, jnp.zeros(()), jnp.zeros((), jnp.int32))
    if parts == 1:
        carry, _ = accumulate(carry, (images, targets, 0))
    else:
        cut = jax.tree.map(lambda x: _micro_batches(x, parts), (images, targets))
        micro = (*cut, jnp.arange(parts))
        carry, _ = jax.lax.scan(accumulate, carry, micro)
    grads, stats, loss, correct = carry
    grads = jax.tree.map(lambda grad: grad / parts, grads)
    return grads, stats, {"loss": (loss / parts * count, count), "top1": (correct * 1.0, count)}


def _outputs(
    module: Model,
    images: jax.Array,
    targets: losses.Targets,
    key: jax.Array,
    settings: StepSettings,
) -> tuple[Outputs, losses.Targets]:
    """Returns a model's outputs and their targets, with MixToken if that is on.

    Where patches were mixed, each token goes back to the image that it is from before the dense
    head classifies it, and the image's label becomes the mean of the two images' labels, weighted
    by area.
    """
    if not settings.mix_token:
        return module.outputs(images, key), targets
    group = settings.mix_token
    patches, boxes = mix.mix_tokens(module.embed(images), jax.random.fold_in(key, 1), group)
    tokens = module.encode(patches, jax.random.fold_in(key, 0))
    if getattr(module, "dense_head", None) is not None:
        # Tokens rather than their logits, of which there are more: a group's images are on several
        # devices.
        from_partner = boxes.reshape(len(boxes), -1, 1)
        num_prefix = tokens.shape[1] - from_partner.shape[1]
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        patches = jnp.where(from_partner, mix.partners(patches, group), patches)
        tokens = jnp.concatenate([prefix, patches], axis=1)
    outputs = module.classify(tokens)
    area = boxes.mean((1, 2))[:, None]

    def by_area(labels: jax.Array) -> jax.Array:
        return (1 - area) * labels + area * mix.partners(labels, group)

    return outputs, losses.Targets(
        label=by_area(targets.label),
        distilled=None if targets.distilled is None else by_area(targets.distilled),
        dense=targets.label[:, None] if targets.dense is None else targets.dense,
    )


def _micro_batches(x: jax.Array, parts: int) -> jax.Array:
    """Reshapes [B, ...] to [parts, B/parts, ...] so that each device keeps its own examples."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
