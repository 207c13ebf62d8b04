"""Swin on ImageNet-1K (arXiv 2103.14030).

    python -m spvit_jax.train --config=configs/swin.py:t --workdir=runs/swin_t

Argument: `size` (t, s, b). The authors trained at 224 pixels on 8 GPUs of 32 GB. The paper's top-1:
t 81.3, s 83.0, b 83.5; `configs/imagenet.py` evaluates L, which began on ImageNet-22K.
`--config.model.masked_heads=thirds` puts MaiT's masks on the heads of its windows.

Values are those of `spvit_jax.recipes.swin`.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import recipes
from spvit_jax.errors import InputError


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "t"."""
    args = config_lib.parse_arg(arg, size="t")
    if args.size not in ("t", "s", "b"):
        raise InputError(f"config argument {arg!r}: expected a size of t, s or b")

    return recipes.swin(f"swin_{args.size}")
