"""LV-ViT on ImageNet-1K: training at 224 pixels, fine-tuning at 384 (arXiv 2104.10858).

    python -m spvit_jax.train --config=configs/lvvit.py:s --workdir=runs/lvvit_s \
        --config.token_labels.path=labels.npy
    python -m spvit_jax.train --config=configs/lvvit.py:s,384 --workdir=runs/lvvit_s_384 \
        --config.token_labels.path=labels.npy --config.init_from=runs/lvvit_s

Arguments: `size` (t, s, m, l) and `image_size` (224, 384), in this order or by name. It is SP-ViT's
recipe without its priors, for the comparison that SP-ViT's paper makes, sized for 8 accelerators of
32 GB. The token labels are the published ones (`python -m spvit_jax.data.token_labels pack`);
without a path each token learns the image's label. The papers' top-1: t 79.1, s 83.3 and 84.4 at
384, m 84.0 and 85.4, l 86.2 at 448.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.errors import InputError

# Batch and learning rate at 224 pixels; batch at 384.
SIZES = {
    "t": (1024, 1.6e-3, 256),
    "s": (1024, 1.6e-3, 256),
    "m": (1024, 1.6e-3, 128),
    "l": (800, 6e-4, 512),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "s,384"."""
    args = config_lib.parse_arg(arg, size="s", image_size=224)
    if args.size not in SIZES or args.image_size not in (224, 384):
        raise InputError(
            f"config argument {arg!r}: expected a size of t, s, m or l, and 224 or 384 pixels; "
            "other resolutions are set by --config.model.image_size"
        )
    batch_size, lr, batch_size_384 = SIZES[args.size]

    config = config_lib.base()
    config.model.name = f"lvvit_{args.size}"
    config.model.image_size = args.image_size

    config.augment.interpolation = "random"
    config.augment.rand_augment = f"rand-{'n3-' if args.size == 'l' else ''}m9-mstd0.5-inc1"
    config.augment.erase = 0.25
    config.augment.mix_token = True

    config.data.batch_size = batch_size
    config.optim.lr = lr
    config.optim.ema = 0.99992
    config.schedule.total = "310 epochs"
    config.schedule.warmup = "5 epochs"
    config.schedule.cooldown = "10 epochs"
    if args.image_size == 384:
        config.data.batch_size = batch_size_384
        config.optim.lr = config.optim.min_lr = 5e-6
        config.optim.weight_decay = 1e-8
        config.optim.ema = 0.99992 if args.size == "l" else 0.0
        config.schedule.total = "30 epochs"
        config.schedule.cooldown = "0 epochs"
    return config
