"""TensorFlow, quiet and told to leave accelerators to JAX; import `tf` from here."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # the same pixels on every CPU

# TensorFlow imports Keras 3 with itself, a third of the time that it takes to start, unless it is
# told that an older one is used; whoever does use Keras still gets the one that is installed.
_KERAS = "TF_USE_LEGACY_KERAS"
_wanted = os.environ.get(_KERAS)
os.environ[_KERAS] = "1"
import tensorflow as tf  # noqa: E402

if _wanted is None:
    del os.environ[_KERAS]
else:
    os.environ[_KERAS] = _wanted

tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
