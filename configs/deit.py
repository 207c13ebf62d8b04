"""DeiT on ImageNet-1K, with and without distillation (arXiv 2012.12877).

    python -m spvit_jax.train --config=configs/deit.py:s --workdir=runs/deit_s
    python -m spvit_jax.train --config=configs/deit.py:s,distilled=1 --workdir=runs/distilled \
        --config.distill.teacher=weights/teacher

Arguments: `size` (ti, s, b) and `distilled` (0, 1), in this order or by name. The authors trained
on 4 to 8 GPUs of 16 GB or more. The paper's top-1: ti 72.2, s 79.9, b 81.8; distilled from a
RegNetY-16GF 74.5, 81.2, 83.4. The teacher is hard: its most probable class is the label of the
distillation token. It may be any checkpoint of this project, or a file that says what model it is.

Values are the defaults of `main.py` in github.com/facebookresearch/deit, at 1024 images. Otherwise
than there, the learning rate changes at each step, not at each epoch.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import recipes
from spvit_jax.errors import InputError


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "s" or "s,distilled=1"."""
    args = config_lib.parse_arg(arg, size="s", distilled=0)
    if args.size not in ("ti", "s", "b") or args.distilled not in (0, 1):
        raise InputError(f"config argument {arg!r}: expected a size of ti, s or b, and distilled=1")

    name = f"deit_{args.size}" + ("_distilled" if args.distilled else "")
    config = recipes.deit(name, epochs=300)
    # Images on one of the authors' GPUs, of which there were 16 for b and 4 for the others.
    config.augment.mix_group_size = 64 if args.size == "b" else 256
    return config
