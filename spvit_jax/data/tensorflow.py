"""TensorFlow with few log messages and without accelerators, which JAX uses; import `tf` here."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # the same pixels on every CPU

# TensorFlow imports Keras 3, a third of its start-up time, unless this variable asks for Keras 2.
# It is reset below, so that a later import of Keras gets the one that is installed.
_KERAS = "TF_USE_LEGACY_KERAS"
_previous = os.environ.get(_KERAS)
os.environ[_KERAS] = "1"
import tensorflow as tf  # noqa: E402

if _previous is None:
    del os.environ[_KERAS]
else:
    os.environ[_KERAS] = _previous

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
