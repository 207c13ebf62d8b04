"""Models with weights far from their initial values, made and run without waiting for either."""

import jax
import jax.numpy as jnp
import numpy as np

from spvit_jax.models import model_config
from spvit_jax.models.naming import map_named
from spvit_jax.training.state import Variables


def abstract_variables(config):
    """A model's variables with shapes in the place of arrays."""
    return Variables.of(config.abstract())


def random_variables(name, *, dtype="float32", seed=0, **overrides):
    """A named model's variables, drawn at random where initial values would hide mistakes."""
    abstract = abstract_variables(model_config(name, dtype=dtype, **overrides))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.3 * rng.normal(size=leaf.shape)
        if path.endswith("var"):
            noise = 0.5 + abs(noise)
        elif path.endswith(("scale", "b2")):
            noise = 1 + noise
        return jnp.asarray(noise, "float64" if dtype == "float64" else "float32")

    return map_named(draw, abstract)


def run(variables, images, key=None, *, train=False):
    """The model's result, jitted: logits, or outputs in train mode."""
    return jax.jit(lambda v, x, k: v.model(train=train)(x, k))(variables, images, key)
