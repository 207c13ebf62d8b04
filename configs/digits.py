"""Handwritten digits on a CPU: the package's own data set, small enough to train in minutes.

    python -m spvit_jax.train --config=configs/digits.py --workdir=runs/digits

On two CPU cores it trains for about three minutes and ends at a test accuracy of 98 to 99%.

Arguments: `model` (vit, lvvit, spvit, mait) and `train_size`, for example
`--config=configs/digits.py:model=mait,train_size=200`. The four models are near-equal in size and
share one recipe, so that they compare. An image of 8×8 pixels is enlarged to 12×12 and cut into
6×6 patches.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.errors import InputError, nearest

# The MLPs of the first and the last are wider, by as many parameters as the others' stem has.
MODELS = {
    "vit": {"name": "deit_ti", "mlp_ratio": 3.5},
    "lvvit": {"name": "lvvit_t", "stem_width": 16},
    "spvit": {"name": "spvit_s", "stem_width": 16, "skip_lam": 1.0, "spatial_layers": 3},
    "mait": {"name": "mait_t", "mlp_ratio": 3.5, "masked_heads": ((2, 3), (1, 1), (1, 0))},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "model=mait,train_size=200"."""
    args = config_lib.parse_arg(arg, model="spvit", train_size=int)
    if args.model not in MODELS:
        raise InputError(f"unknown model {args.model!r}{nearest(args.model, MODELS)}")

    config = config_lib.base()
    config.model.update(MODELS[args.model])
    config.model.image_size = 12
    config.model.patch_size = 2
    config.model.dim = 48
    config.model.depth = 4
    config.model.num_heads = 3
    config.model.drop_path = 0.05

    config.data.dataset = "digits"
    config.data.eval_split = "test"
    config.data.train_size = args.train_size
    config.data.batch_size = 64
    config.data.eval_batch_size = 250
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)

    config.augment.crop_scale = (0.7, 1.0)
    config.augment.crop_ratio = (0.8, 1.25)
    config.augment.interpolation = "bilinear"
    config.augment.flip = 0.0
    config.augment.eval_crop = 1.0

    config.optim.lr = 3e-3
    config.optim.ema = 0.98
    config.optim.clip_norm = 1.0
    config.schedule.total = "1600 steps"
    config.schedule.warmup = "80 steps"
    config.log_every = "40 steps"
    config.eval_every = "160 steps"
    config.checkpoint.every = "80 steps"
    return config
