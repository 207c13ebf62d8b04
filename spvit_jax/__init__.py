"""Vision transformers with spatial priors (SP-ViT, MaiT) and their baselines, in JAX."""

import os

__version__ = "0.1.0"

# etils.epath would read gs:// with TensorFlow where that is installed; training does without it.
os.environ.setdefault("EPATH_USE_TF", "0")
# gcsfs would ask another service for the kind of each bucket, which only zonal ones need.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "0")
