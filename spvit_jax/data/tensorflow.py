"""TensorFlow, quiet and told to leave accelerators to JAX; import `tf` from here."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # the same pixels on every CPU

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
