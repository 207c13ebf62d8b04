"""Optimizers, weight decay by rules on parameter names, and learning rates by step and layer."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from spvit_jax.errors import InputError, nearest
from spvit_jax.models.naming import map_named

# (pattern, whether weight decay applies); the first that matches a parameter's name decides.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|/)(pos_embed|cls_token|dist_token)$", False),
    (r"(^|/)(bias|b1|b2|scale|gamma|position/table)$", False),
    (r"(^|/)(kernel|w1|w2)$", True),
)

NAMES = ("adamw", "lamb", "sgd")
# Groups of parameters above all blocks.
_TOP = ("norm", "head", "dist_head", "dense_head")


def decay_mask(params: Any) -> Any:
    """Returns whether weight decay applies to each parameter, as a pytree of bool like `params`.

    Raises:
      ValueError: a parameter matches no rule.
    """

    def decays(name: str, _: Any) -> bool:
        for pattern, decay in DECAY_RULES:
            if re.search(pattern, name):
                return decay
        raise ValueError(f"no decay rule matches parameter {name!r}; add one to DECAY_RULES")

    return map_named(decays, params)


def check_name(name: str) -> None:
    """Raises an `InputError` if there is no such optimizer."""
    if name not in NAMES:
        raise InputError(f"unknown optim.name {name!r}{nearest(name, NAMES)}")


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step: warm-up, cosine, cooldown.

    As in timm, with which all recipes' authors trained, the cosine goes from the first step to the
    cooldown, and the warm-up covers its beginning.

    Args:
      config: resolved configuration; `schedule` is in steps.
    """
    optim, schedule = config.optim, config.schedule
    steps = max(schedule.total - schedule.cooldown, 1)
    warmup = optax.linear_schedule(optim.warmup_lr, optim.lr, schedule.warmup)
    cosine = optax.cosine_decay_schedule(optim.lr, steps, alpha=optim.min_lr / optim.lr)
    return lambda step: jnp.where(step < schedule.warmup, warmup(step), cosine(step))


def layer_scales(params: Any, decay: float) -> Any:
    """Returns factors of the learning rate, decay^(layers above), as a pytree like `params`.

    Embeddings are the lowest layer, then the blocks in order, then norm and heads with a factor
    of 1 (layer-wise learning rate decay, as in BEiT, arXiv 2106.08254).

    Args:
      params: parameters of a model.
      decay: ratio of the learning rate of a layer to that of the next.
    """
    blocks = _count(params, "blocks")
    top = blocks + _count(params, "class_blocks") + 1

    def scale(name: str, _: Any) -> float:
        group, _, rest = name.partition("/")
        number = rest.partition("/")[0]
        if group == "blocks":
            layer = int(number) + 1
        elif group == "class_blocks":
            layer = blocks + int(number) + 1
        elif group == "merges":
            layer = _first_block_after(params, int(number)) + 1
        else:
            layer = top if group in _TOP else 0
        return decay ** (top - layer)

    return map_named(scale, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of a configuration, with clipping of gradients if that is on.

    AdamW (arXiv 1711.05101) and LAMB (1904.00962) decay weights by the learning rate times
    `weight_decay`, as in torch; SGD, with Nesterov's momentum `b1`, adds `weight_decay` times the
    weights to the gradient, as in timm.

    Raises:
      InputError: there is no such optimizer.
    """
    check_name(config.optim.name)
    optim, rate = config.optim, make_schedule(config)
    adam = {"b1": optim.b1, "b2": optim.b2, "eps": optim.eps}
    decay = {"weight_decay": optim.weight_decay, "mask": decay_mask}
    makers = {
        "adamw": lambda: optax.adamw(rate, **adam, **decay),
        "lamb": lambda: optax.lamb(rate, **adam, **decay),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(**decay), optax.sgd(rate, momentum=optim.b1, nesterov=True)
        ),
    }
    parts = [makers[optim.name]()]
    if optim.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(optim.clip_norm))
    if optim.layer_decay != 1:
        parts.append(_scale_layers(optim.layer_decay))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def _scale_layers(decay: float) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        scales = layer_scales(params, decay)
        return jax.tree.map(lambda update, scale: update * scale, updates, scales)

    return optax.stateless(update)


def _count(params: Any, group: str) -> int:
    """Returns the number of blocks in a group of parameters, such as "blocks"."""
    return len(params[group]) if group in params else 0


def _first_block_after(params: Any, merge: int) -> int:
    """Returns the index of the first block after one of Swin's patch mergings."""
    channels = params["merges"][merge]["reduction"]["kernel"].shape[1]
    blocks = params["blocks"]
    return min(i for i in blocks if blocks[i]["norm1"]["scale"].shape[0] == channels)
