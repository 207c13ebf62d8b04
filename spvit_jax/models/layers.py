"""Layers of a block other than attention: MLP, norm, drop path, LayerScale, position convolution.

Parameters are float32; `dtype` is the compute dtype.
Named scopes are the names of a step's parts in `preflight` and in profiles.
Attention is in `attention.py`, embeddings of images in `stem.py`, the block itself in `block.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.kernels import position_conv
from spvit_jax.models.implementation import platform
from spvit_jax.models.initializers import conv_bias, conv_kernel, linear_kernel
from spvit_jax.models.spatial import Grid


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums and softmaxes over `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Linear):
    """A linear layer, [..., C] → [..., D], whose bias has a gradient that is summed in float32."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # without its shardings
        y = jnp.dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias [D] to x [..., D], in the dtype of x."""
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients: that of the bias as a product with ones.

    JAX's is a sum in the dtype of x: of more than 256 terms in bfloat16 some may be lost, and on
    TPUs the sum takes the vector unit more than ten times as long as a product the matrix unit.
    """
    ones = jnp.ones(gradient.shape[:-1], gradient.dtype)
    axes = tuple(range(ones.ndim))
    total = jax.lax.dot_general(
        ones,
        gradient,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(gradient.dtype),
    )
    return gradient, total.astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


class Mlp(nnx.Module):
    """Two linear layers with an exact (erf) GELU between them, on [..., D]."""

    def __init__(self, dim: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, hidden, kernel_init=linear_kernel, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, kernel_init=linear_kernel, dtype=dtype, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, x·Φ(x), by erf as torch does (arXiv 1606.08415).

    In float32 at least, rounded once. `jax.nn.gelu` takes erfc, for which a TPU writes a second
    array of the hidden width to memory.
    """
    precise = x.astype(accumulation_dtype(x.dtype))
    return (0.5 * precise * (1 + jax.lax.erf(precise * 0.5**0.5))).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over channels, [..., D] (arXiv 1607.06450)."""

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # without its mask
        return super().__call__(x)


class LayerScale(nnx.Module):
    """A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239).

    Its result is float32 at least, as are the residual streams that it is added to.
    """

    def __init__(self, dim: int, initial: float):
        self.gamma = nnx.Param(jnp.full((dim,), initial, jnp.float32))

    @jax.named_scope("layer_scale")
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...]


@jax.named_scope("drop_path")
def draw_drop_path(key: jax.Array, rates: Sequence[float], examples: int) -> jax.Array:
    """Draws which examples lose which residual branches, for all layers of a model at once.

    One draw for all layers takes a compiler a fraction of the time of one in each.

    Args:
      key: random key.
      rates: probability in [0, 1) with which an example loses a branch of each layer.
      examples: number of examples B.

    Returns:
      Factors [layers, 2, B] float32 of a layer's two branches: 0 where an example loses the
      branch, else 1 / (1 - rate) (stochastic depth, arXiv 1603.09382).
    """
    keep_rate = 1 - jnp.asarray(rates, jnp.float32)[:, None, None]
    keep = jax.random.bernoulli(key, keep_rate, (len(rates), 2, examples))
    return keep / keep_rate


@jax.named_scope("drop_path")
def drop_path(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Multiplies a residual branch [B, ...] by its factors [B] of `draw_drop_path`.

    A lost branch is 0 even where it is not finite. Without factors nothing is lost (evaluation).
    """
    if factor is None:
        return x
    factor = factor.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(factor > 0, x * factor, 0).astype(x.dtype)


class PosConv(nnx.Module):
    """SP-ViT's position convolution: x + DWConv3×3(x) on the patches, prefix tokens untouched.

    Parameters kernel [3, 3, 1, D], the layout of a depthwise convolution, and bias [D].
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(conv_kernel(rngs.params(), (3, 3, 1, dim), jnp.float32))
        self.bias = nnx.Param(conv_bias(9)(rngs.params(), (dim,), jnp.float32))

    @jax.named_scope("pos_conv")
    def __call__(self, x: jax.Array, grid: Grid, num_prefix: int) -> jax.Array:
        """Maps tokens [B, P+N, D] of a grid h·w = N behind P prefix tokens."""
        kernel, bias = self.kernel[...], self.bias[...]
        if platform() == "tpu" and position_conv.supports(x.shape[-1], x.dtype):
            return position_conv.position_conv(x, kernel, bias, grid, num_prefix)
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        image = patches.reshape(x.shape[0], *grid, x.shape[-1])
        position = depthwise_conv(image, kernel).reshape(patches.shape) + bias
        return jnp.concatenate([prefix, patches + position.astype(x.dtype)], axis=1)


@jax.custom_vjp
@jax.jit
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves each channel of x [B, h, w, D] with its own kernel [kh, kw, 1, D], zero padded.

    Written as a sum of shifted products, which the compiler fuses into one loop: a training step
    of the digits model takes 0.6 of the time it takes with XLA's grouped convolution on a CPU. The
    sum is of the kernel's dtype at least.
    """
    return functools.reduce(
        jnp.add, (shifted * kernel[i, j, 0] for (i, j), shifted in _shifts(x, kernel.shape))
    )


def _depthwise_conv_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients: a convolution with the kernel turned, and a sum for each weight.

    That of each shifted product would be an array of its own.
    """
    x, kernel = residuals
    sums = [(shifted * gradient).sum(axis=(0, 1, 2)) for _, shifted in _shifts(x, kernel.shape)]
    dx = depthwise_conv(gradient, kernel[::-1, ::-1])
    return dx.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


depthwise_conv.defvjp(lambda *inputs: (depthwise_conv(*inputs), inputs), _depthwise_conv_backward)


def _shifts(
    x: jax.Array, kernel_shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """Yields each place (i, j) in a kernel, and x [B, h, w, D] shifted to what the place sees."""
    (rows, columns), (h, w) = kernel_shape[:2], x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    for i in range(rows):
        for j in range(columns):
            yield (i, j), x[:, i : i + h, j : j + w]
