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

Values are those of the commands in the README of github.com/zihangJiang/TokenLabeling; t, and all
sizes at 384, follow its commands for s. The 30 epochs of the fine-tune are the paper's.

Otherwise than theirs, on purpose: the crop comes before RandAugment, which theirs applies to the
whole image; BatchNorm normalises over the whole batch, theirs over the images of each of 8 GPUs
(`--config.model.batch_norm_group=128` does that at 224 pixels); the learning rate changes at
each step, theirs at each epoch.
"""

from ml_collections import ConfigDict

from spvit_jax import recipes


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "s,384"."""
    return recipes.token_labelling("lvvit", ("t", "s", "m", "l"), arg)
