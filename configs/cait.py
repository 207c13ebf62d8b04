"""CaiT on ImageNet-1K (arXiv 2103.17239).

    python -m spvit_jax.train --config=configs/cait.py:s24 --workdir=runs/cait_s24
    python -m spvit_jax.train --config=configs/cait.py:s24 --workdir=runs/cait_s24_masked \
        --config.model.masked_heads="((8, 8), (8, 1), (8, 0))"

Argument: `size` (xxs24, xxs36, xs24, s24, s36, m36, m48). DeiT's recipe, but 400 epochs; drop path
is the same in all layers, and comes with the size. The authors trained at 224 pixels on 8 to 16
GPUs of 32 GB. The second command puts MaiT's masks on its heads. The papers' top-1 at 224 without
distillation: xxs24 77.6.

Values are the defaults of `main.py` in github.com/facebookresearch/deit, where CaiT is published
too, with the epochs and the drop path of the paper. Otherwise than there, the learning rate changes
at each step, not at each epoch.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import recipes
from spvit_jax.errors import InputError
from spvit_jax.models import list_models


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "s24"."""
    args = config_lib.parse_arg(arg, size="s24")
    sizes = [name.removeprefix("cait_") for name in list_models("cait_*")]
    if args.size not in sizes:
        raise InputError(f"config argument {arg!r}: expected a size of {', '.join(sizes)}")

    return recipes.deit(f"cait_{args.size}", epochs=400)
