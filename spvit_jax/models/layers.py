"""Layers other than attention: MLP, drop path, LayerScale, patch embeddings, convolutions.

Images and feature maps are channels last. Parameters are float32; `dtype` is the compute dtype.
Named scopes are the names of a step's parts in `preflight` and in profiles.
Attention is in `attention.py`, the blocks themselves in the files of the families.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.models.initializers import conv_bias, conv_kernel, linear_kernel
from spvit_jax.models.spatial import Grid


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums and softmaxes over `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Mlp(nnx.Module):
    """Two linear layers with an exact (erf) GELU between them, on [..., D]."""

    def __init__(self, dim: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(dim, hidden, kernel_init=linear_kernel, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, dim, kernel_init=linear_kernel, dtype=dtype, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


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
def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Drops whole residual branches per example (stochastic depth, arXiv 1603.09382).

    Args:
      x: output of a residual branch [B, ...].
      rate: probability with which an example loses the branch, in [0, 1).
      key: random key, or None to keep every branch (evaluation).

    Returns:
      x with dropped examples set to 0 and the others divided by 1 - rate.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    keep_rate = jnp.asarray(1 - rate, accumulation_dtype(x.dtype))
    return jnp.where(keep, x / keep_rate, 0).astype(x.dtype)


class PatchEmbed(nnx.Module):
    """ViT's linear embedding of non-overlapping patches: [B, H, W, 3] → [B, h, w, D]."""

    def __init__(self, dim: int, patch_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = _projection(3, dim, patch_size, dtype, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.proj(images)


class BatchNorm(nnx.BatchNorm):
    """BatchNorm that in training normalises each group of images by itself, as each GPU does.

    The running statistics are the mean of those that each group would give. Those of torch's DDP,
    without SyncBatchNorm, are the first GPU's: the same in expectation, with more noise.
    """

    def __init__(self, channels: int, *, group: int | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Creates the layer.

        Args:
          channels: number of channels C.
          group: number of consecutive images in the batch that have common statistics; None, or
            more than the batch has, is all of them. It must divide the batch.
          dtype: dtype of the computation.
          rngs: random keys of the initial weights.
        """
        # flax's momentum is one minus torch's.
        super().__init__(channels, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.group = group

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # without its mask
        """Normalises feature maps [B, h, w, C]."""
        if self.use_running_average or self.group is None or len(x) <= self.group:
            return super().__call__(x)
        graphdef, state = nnx.split(self)

        def normalize(x: jax.Array) -> tuple[jax.Array, nnx.State]:
            layer = nnx.merge(graphdef, state, copy=True)
            return layer(x), nnx.state(layer, nnx.BatchStat)

        groups = x.reshape(-1, self.group, *x.shape[1:])
        normalized, stats = jax.vmap(normalize)(groups)
        nnx.update(self, jax.tree.map(lambda stat: stat.mean(axis=0), stats))
        return normalized.reshape(x.shape)


class ConvStem(nnx.Module):
    """LV-ViT's convolutional patch embedding: [B, H, W, 3] → [B, h, w, D].

    A 7×7 convolution of stride 2 and two 3×3 ones, each with BatchNorm and ReLU, then a
    projection of the remaining stride (8 for patches of 16).
    """

    def __init__(
        self,
        dim: int,
        patch_size: int,
        width: int,
        *,
        batch_norm_group: int | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def conv(channels: int, kernel: int, stride: int, pad: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                width,
                (kernel, kernel),
                strides=stride,
                padding=pad,
                use_bias=False,
                kernel_init=conv_kernel,
                dtype=dtype,
                rngs=rngs,
            )

        def norm() -> BatchNorm:
            precise = accumulation_dtype(dtype)
            return BatchNorm(width, group=batch_norm_group, dtype=precise, rngs=rngs)

        self.conv1, self.bn1 = conv(3, 7, 2, 3), norm()
        self.conv2, self.bn2 = conv(width, 3, 1, 1), norm()
        self.conv3, self.bn3 = conv(width, 3, 1, 1), norm()
        self.proj = _projection(width, dim, patch_size // 2, dtype, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.bn1(self.conv1(images)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        x = jax.nn.relu(self.bn3(self.conv3(x)))
        return self.proj(_unfused_gradient(x) if self.proj.out_features % 256 == 128 else x)


@jax.custom_vjp
def _unfused_gradient(x: jax.Array) -> jax.Array:
    """Returns x; XLA does not fuse the gradient with respect to it with what follows.

    libtpu 0.0.42.1 crashes on v6e, whose products are 256 wide, where it fuses BatchNorm's backward
    pass with that of a projection to an odd multiple of 128 channels, such as SP-ViT-S's 384.
    """
    return x


_unfused_gradient.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.optimization_barrier(grad),))


def _projection(channels: int, dim: int, size: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Creates a convolution whose stride is its kernel: a linear map per patch of size × size."""
    return nnx.Conv(
        channels,
        dim,
        (size, size),
        strides=size,
        padding="VALID",
        kernel_init=conv_kernel,
        bias_init=conv_bias(channels * size * size),
        dtype=dtype,
        rngs=rngs,
    )


class PosConv(nnx.Module):
    """SP-ViT's position convolution: x + DWConv3×3(x) on the patches, prefix tokens untouched.

    Parameters kernel [3, 3, 1, D], the layout of a depthwise convolution, and bias [D].
    """

    def __init__(self, dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(conv_kernel(rngs.params(), (3, 3, 1, dim), jnp.float32))
        self.bias = nnx.Param(conv_bias(9)(rngs.params(), (dim,), jnp.float32))
        self.dtype = dtype

    @jax.named_scope("pos_conv")
    def __call__(self, x: jax.Array, grid: Grid, num_prefix: int) -> jax.Array:
        """Maps tokens [B, P+N, D] of a grid h·w = N behind P prefix tokens."""
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        image = patches.reshape(x.shape[0], *grid, x.shape[-1])
        position = depthwise_conv(image, self.kernel[...].astype(self.dtype))
        position = position.reshape(patches.shape) + self.bias[...].astype(self.dtype)
        return jnp.concatenate([prefix, patches + position], axis=1)


@jax.jit
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves each channel of x [B, h, w, D] with its own kernel [kh, kw, 1, D], zero padded.

    Written as a sum of shifted products, which the compiler fuses into one loop: a training step
    of the digits model takes 0.6 of the time it takes with XLA's grouped convolution on a CPU.
    """
    (rows, columns), (h, w) = kernel.shape[:2], x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    shifted = [
        x[:, i : i + h, j : j + w] * kernel[i, j, 0] for i in range(rows) for j in range(columns)
    ]
    return functools.reduce(jnp.add, shifted)
