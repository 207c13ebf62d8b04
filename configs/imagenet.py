"""Any model of the registry on ImageNet-1K: for evaluating weights of any origin.

    python -m spvit_jax.evaluate --config=configs/imagenet.py:swin_b,384 --checkpoint=swin_b.pth
    python -m spvit_jax.evaluate --config=configs/imagenet.py:cait_s24 --checkpoint=runs/cait \
        --config.data.data_dir=/data/tensorflow_datasets

Arguments: `model`, one of `spvit_jax.models.list_models()`, and `image_size`, pixels such as
384 or 256x320, in this order or by name. Images are resized and cropped as the model's authors did.
Training with this file takes the defaults of `spvit_jax/config.py`, which are no published recipe.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.models import read_image_size


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "swin_b,384"."""
    args = config_lib.parse_arg(arg, model="deit_s", image_size="224")
    config = config_lib.base()
    config.model.name = args.model
    config.model.image_size = read_image_size(args.image_size)
    config.model.dtype = "bfloat16"
    return config
