"""MaiT on ImageNet-1K (arXiv 2207.03006).

    python -m spvit_jax.train --config=configs/mait.py:s --workdir=runs/mait_s

Argument: `size` (xt, t, xs, s, s_layerscale, or pyramid_t, pyramid_s, pyramid_b). Heads are masked
by thirds of the layers: all, one, none. DeiT's recipe, but 400 epochs, as the paper has it for
models deeper than 12 layers; sized for 8 accelerators of 16 GB or more. The paper's top-1: t 79.1,
s with LayerScale 82.8. The pyramids are hierarchical, with Swin's stages and Swin's recipe; theirs
at 384 pixels is `--config.model.image_size=384`.

Values are the paper's; what it does not say is as in `configs/deit.py` and `configs/swin.py`.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import recipes
from spvit_jax.errors import InputError

SIZES = ("xt", "t", "xs", "s", "s_layerscale", "pyramid_t", "pyramid_s", "pyramid_b")


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "s"."""
    args = config_lib.parse_arg(arg, size="s")
    if args.size not in SIZES:
        raise InputError(f"config argument {arg!r}: expected a size of {', '.join(SIZES)}")

    name = f"mait_{args.size}"
    return recipes.swin(name) if "pyramid" in name else recipes.deit(name, epochs=400)
