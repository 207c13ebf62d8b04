"""AdamW with decay by named rules, and the learning rate's schedule."""

from __future__ import annotations

import re
from typing import Any

import optax
from ml_collections import ConfigDict

from spvit_jax.models.naming import map_named

# (pattern, whether weight decay applies); the first that matches a parameter's name decides.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|/)(pos_embed|cls_token|dist_token)$", False),
    (r"(^|/)(bias|b1|b2|scale|gamma|position/table)$", False),
    (r"(^|/)(kernel|w1|w2)$", True),
)


def decay_mask(params: Any) -> Any:
    """Returns a pytree of bool like `params`: whether weight decay applies.

    Raises:
      ValueError: a parameter matches no rule.
    """

    def decays(name: str, _: Any) -> bool:
        for pattern, decay in DECAY_RULES:
            if re.search(pattern, name):
                return decay
        raise ValueError(f"no decay rule matches parameter {name!r}; add one to DECAY_RULES")

    return map_named(decays, params)


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step: warm-up, cosine, cooldown.

    Args:
      config: resolved; `schedule` is in steps.
    """
    optim, schedule = config.optim, config.schedule
    cosine = schedule.total - schedule.warmup - schedule.cooldown
    parts = [
        optax.linear_schedule(optim.warmup_lr, optim.lr, schedule.warmup),
        optax.cosine_decay_schedule(optim.lr, max(cosine, 1), alpha=optim.min_lr / optim.lr),
        optax.constant_schedule(optim.min_lr),
    ]
    return optax.join_schedules(parts, [schedule.warmup, schedule.warmup + cosine])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101) as the configuration says, after clipping if that is on.

    Weight decay is multiplied by the learning rate, as in torch.
    """
    optim = config.optim
    adamw = optax.adamw(
        make_schedule(config),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    if optim.clip_norm:
        return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)
    return adamw
