"""Numbers of a model's parameters and multiply-adds, counted from the traced program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from spvit_jax.models.base import ModelConfig
from spvit_jax.models.implementation import Implementation, platform


def count_parameters(config: ModelConfig) -> int:
    """Returns the exact number of a model's trainable parameters, without allocating any."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(config.abstract(), nnx.Param)))


def count_macs(config: ModelConfig) -> int:
    """Returns the multiply-adds of a model's convolutions and matrix products for one image.

    Which heads are computed at linear cost is up to `config.attention`, and if that is "auto", to
    the devices.
    """
    if platform() == "gpu":  # whose kernel is of bfloat16, and its tiles are of no model's size
        config = dataclasses.replace(config, dtype="float32")
    if config.attention == "fused":  # which can be counted on any platform
        name: Implementation = "xla" if platform() == "gpu" else "fused_interpret"
        config = dataclasses.replace(config, attention=name)
    config = dataclasses.replace(config, scan=True)  # the same, traced once for each kind of block
    graphdef, state = nnx.split(config.abstract())
    images = jax.ShapeDtypeStruct((1, *config.image_shape, 3), jnp.float32)
    return macs_of(lambda state, images: nnx.merge(graphdef, state)(images), state, images)


def macs_of(function: Callable[..., Any], *args: Any) -> int:
    """Returns the multiply-adds of a function's convolutions and matrix products.

    Args:
      function: function that JAX can trace.
      *args: its arguments, arrays or their shapes.
    """
    return _macs_of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _macs_of_jaxpr(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in eqn.invars]
        outputs = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            channels = eqn.params["dimension_numbers"].rhs_spec[0]
            total += outputs * math.prod(shapes[1]) // shapes[1][channels]
        elif eqn.params.get("name") == "depthwise_conv":
            # Shifted products, which count as the convolution that they are.
            total += outputs * math.prod(shapes[1][:2])
        elif eqn.params.get("name") == "offset_products":
            total += outputs * shapes[1][0]  # coordinates
        elif eqn.params.get("name") == "neighbour_products":
            total += outputs * shapes[0][1]  # channels of each product
        elif eqn.params.get("name") == "neighbour_sum":
            total += outputs * shapes[0][0]  # neighbours
        else:
            total += _times(eqn) * sum(_macs_of_jaxpr(p) for p in core.jaxprs_in_params(eqn.params))
    return total


def _times(eqn: Any) -> int:
    """Returns how often an instruction runs the programs in it."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "pallas_call":
            return math.prod(eqn.params["grid_mapping"].grid)
        case _:
            return 1
