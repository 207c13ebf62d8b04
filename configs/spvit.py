"""SP-ViT on ImageNet-1K: training at 224 pixels, fine-tuning at 384 (arXiv 2206.07662).

    python -m spvit_jax.train --config=configs/spvit.py:s --workdir=runs/spvit_s \
        --config.token_labels.path=labels.npy
    python -m spvit_jax.train --config=configs/spvit.py:s,384 --workdir=runs/spvit_s_384 \
        --config.token_labels.path=labels.npy --config.init_from=runs/spvit_s
    python -m spvit_jax.evaluate --config=configs/spvit.py:s,384 --checkpoint=spvit_s_384.pth.tar

Arguments: `size` (s, m, l) and `image_size` (224, 384), in this order or by name. The start of a
fine-tune, `config.init_from`, is a run at 224 or the authors' file; positions are resized.

Values are those of the authors' scripts, `distributed_train.sh` and `distributed_fine_tune.sh` in
github.com/ZhouYuxuanYX/SP-ViT-Learning-2D-Spatial-Priors-for-Vision-Transformers; the 30 epochs of
the fine-tune are the paper's. Its learning rate is constant, apart from the warm-up that their
training code always does. The token labels are the published ones
(`python -m spvit_jax.data.token_labels pack`); without a path each token learns the image's label.

Otherwise than theirs, on purpose: the crop comes before RandAugment, which theirs applies to the
whole image; BatchNorm normalises over the whole batch, theirs over the images of each of 8 GPUs
(`--config.model.batch_norm_group=128` does that at 224 pixels, for l 100); the learning rate
changes at each step, theirs at each epoch.

The accuracies below are the paper's top-1.

| size | hardware of the authors | 224 | 384 |
|---|---|---|---|
| s | 8 GPUs | 83.9 | 85.1 |
| m | 8 GPUs | 84.9 | 86.0 |
| l | 8 GPUs | 85.5 | 86.3 |
"""

from ml_collections import ConfigDict

from spvit_jax import recipes


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, such as "s,384"."""
    return recipes.token_labelling("spvit", ("s", "m", "l"), arg)
