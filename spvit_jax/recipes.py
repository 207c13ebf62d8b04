"""What the recipes in `configs/` share: where they are, DeiT's, Swin's, and token labels."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.errors import InputError

# Batch size and learning rate at 224 pixels; batch size at 384, and that of one of the authors' 8
# GPUs. LV-ViT's are the commands of its README, which has none for T, and at 384 one for S alone.
_TOKEN_LABELLING = {
    "lvvit_t": (1024, 1.6e-3, 512, 64),
    "lvvit_s": (1024, 1.6e-3, 512, 64),
    "lvvit_m": (1024, 1.6e-3, 512, 64),
    "lvvit_l": (1024, 1e-3, 512, 64),
    "spvit_s": (1024, 1.6e-3, 256, 32),
    "spvit_m": (1024, 1.6e-3, 128, 16),
    "spvit_l": (800, 6e-4, 512, 16),
}


def shipped() -> dict[str, pathlib.Path]:
    """Returns the files of the recipes that come with the package, by name, such as "spvit"."""
    package = pathlib.Path(__file__).parent
    # In an installed package they are inside it, in a checkout beside it.
    folder = next(
        (path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None
    )
    files = [] if folder is None else sorted(folder.glob("*.py"))
    return {path.stem: path for path in files}


def deit(model: str, *, epochs: int) -> ConfigDict:
    """Returns DeiT's recipe (arXiv 2012.12877) for a named model at 224 pixels.

    Values are the defaults of `main.py` in github.com/facebookresearch/deit.
    """
    config = config_lib.base()
    config.model.name = model
    config.model.dtype = "bfloat16"

    config.augment.repeats = 3
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.augment.erase = 0.25
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.augment.mix_group_size = 128  # images of the batch on one of 8 GPUs

    config.data.batch_size = 1024
    config.optim.lr = 1e-3
    config.schedule.total = f"{epochs} epochs"
    config.schedule.warmup = "5 epochs"
    return config


def swin(model: str) -> ConfigDict:
    """Returns Swin's recipe (arXiv 2103.14030) for a named model at 224 pixels: DeiT's, changed.

    Values are those of `config.py` in github.com/microsoft/Swin-Transformer, its rates at 1024
    images.
    """
    config = deit(model, epochs=300)
    config.augment.repeats = 1
    config.optim.clip_norm = 5.0
    config.schedule.warmup = "20 epochs"
    return config


def token_labelling(family: str, sizes: tuple[str, ...], arg: str | None) -> ConfigDict:
    """Returns LV-ViT's recipe (arXiv 2104.10858), which is SP-ViT's too.

    Values are the defaults of `main.py` in github.com/zihangJiang/TokenLabeling, with which both
    trained, and what their commands change.

    Args:
      family: "lvvit" or "spvit".
      sizes: sizes that the family has.
      arg: argument of the config file, a size and 224 or 384 pixels, such as "s,384".

    Raises:
      InputError: the argument asks for another size or resolution.
    """
    args = config_lib.parse_arg(arg, size="s", image_size=224)
    if args.size not in sizes or args.image_size not in (224, 384):
        raise InputError(
            f"config argument {arg!r}: expected a size of {', '.join(sizes)}, and 224 or 384 "
            "pixels; other resolutions are set by --config.model.image_size"
        )
    name = f"{family}_{args.size}"
    batch_size, lr, batch_size_384, group_384 = _TOKEN_LABELLING[name]

    config = config_lib.base()
    config.model.name = name
    config.model.image_size = args.image_size
    config.model.dtype = "bfloat16"

    config.augment.interpolation = "random"
    config.augment.rand_augment = f"rand-{'n3-' if args.size == 'l' else ''}m9-mstd0.5-inc1"
    config.augment.erase = 0.25
    config.augment.mix_token = True
    config.augment.mix_group_size = batch_size // 8  # images on one of the authors' 8 GPUs

    config.data.batch_size = batch_size
    config.optim.lr = lr
    config.optim.ema = 0.99992
    config.schedule.total = "310 epochs"
    config.schedule.warmup = "5 epochs"
    config.schedule.cooldown = "10 epochs"
    if args.image_size == 384:
        config.augment.mix_group_size = group_384
        config.data.batch_size = batch_size_384
        config.optim.lr = config.optim.min_lr = 5e-6
        config.optim.weight_decay = 1e-8
        config.optim.ema = 0.99992 if name == "spvit_l" else 0.0
        config.schedule.total = "30 epochs"
        config.schedule.cooldown = "0 epochs"
    return config
