"""Any model with trained weights on a folder of one's own images: `docs/finetuning.md`.

    python -m spvit_jax.train --config=configs/finetune.py:deit_s,data=photos \
        --config.init_from=hf:timm/deit_small_patch16_224.fb_in1k --workdir=runs/photos

Arguments: `model`, one of `spvit_jax.models.list_models()`, `image_size`, pixels such as 384, in
this order or by name, and `data`, a folder with `train/CLASS/IMAGE` and `validation/CLASS/IMAGE`.
The head is new, for the folder's classes.

Values are where fine-tuning of ViTs commonly begins: AdamW with a small rate that falls from the
head to the first layer, little augmentation, thirty epochs. They are no paper's, and no accuracy is
known of them; for many images, a recipe of the model's family with `init_from` is a better start.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.models import read_image_size


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "deit_s,data=photos"."""
    args = config_lib.parse_arg(arg, model="deit_s", image_size="224", data=str)
    config = config_lib.base()
    config.model.name = args.model
    config.model.image_size = read_image_size(args.image_size)
    config.model.drop_path = 0.1
    config.init_new_head = True

    if args.data is not None:
        config.data.dataset = f"folder:{args.data}"
    config.data.batch_size = 64
    config.data.eval_batch_size = 64

    config.augment.crop_scale = (0.25, 1.0)
    config.augment.color_jitter = 0.3

    config.optim.lr = 3e-4
    config.optim.min_lr = 1e-6
    config.optim.warmup_lr = 1e-6
    config.optim.layer_decay = 0.75
    config.optim.clip_norm = 1.0
    config.schedule.total = "30 epochs"
    config.schedule.warmup = "3 epochs"
    config.log_every = "1 epoch"
    return config
