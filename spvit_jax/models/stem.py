"""Embeddings of images as patch tokens: ViT's linear one, and LV-ViT's convolutional stem.

Images and feature maps are channels last. Parameters are float32; `dtype` is the compute dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.models.implementation import platform
from spvit_jax.models.initializers import conv_bias, conv_kernel
from spvit_jax.models.layers import accumulation_dtype

LANES = 128  # channels that a TPU works on at once; an array of fewer is padded to as many


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
        """Normalises feature maps [B, h, w, C], or [B, h, w/2, 2·C] of pairs of pixels."""
        shape, x = x.shape, x.astype(self.dtype)
        if self.use_running_average:
            mean, var = self.mean[...][None], self.var[...][None]
        else:
            group = min(self.group or len(x), len(x))
            x = x.reshape(len(x) // group, group, *shape[1:])
            mean = self._mean(x)
            var = jnp.maximum(self._mean(jnp.square(x)) - jnp.square(mean), 0)
            for running, new in ((self.mean, mean), (self.var, var)):
                kept = self.momentum * running[...]
                running[...] = kept + (1 - self.momentum) * new.mean(axis=0)

        def over_pixels(value: jax.Array) -> jax.Array:
            tiled = jnp.tile(value, shape[-1] // self.num_features)
            return tiled.reshape(-1, *[1] * (x.ndim - 2), shape[-1])

        scale, bias = self.scale, self.bias
        assert scale is not None
        assert bias is not None
        factor = jax.lax.rsqrt(var + self.epsilon) * scale[...]
        x = (x - over_pixels(mean)) * over_pixels(factor) + over_pixels(bias[...])
        return x.reshape(shape)

    def _mean(self, groups: jax.Array) -> jax.Array:
        """Returns the mean [groups, C] over the pixels of groups of feature maps."""
        mean = groups.mean(axis=(1, 2, 3))
        return mean.reshape(len(mean), -1, self.num_features).mean(axis=1)


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
        self.dtype = dtype
        # Pairs of pixels have to fit into the lanes, and into the patches of half the resolution.
        self.has_pairs = 2 * width <= LANES and patch_size % 4 == 0

    def __call__(self, images: jax.Array) -> jax.Array:
        if self.has_pairs and platform() == "tpu":
            return self.on_pairs(images)
        return self.on_pixels(images)

    def on_pixels(self, images: jax.Array) -> jax.Array:
        """Embeds images by the convolutions as they are."""
        x = jax.nn.relu(self.bn1(self.conv1(images)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        x = jax.nn.relu(self.bn3(self.conv3(x)))
        return self.proj(self._before_projection(x))

    def on_pairs(self, images: jax.Array) -> jax.Array:
        """Embeds images by feature maps [B, H/2, W/4, 2·width] of pairs of neighbours in a row.

        The same sums as `on_pixels`, with zeros among them. A TPU pads 64 channels to 128: in pairs
        a feature map is half as large, and everything on it takes half the time.
        """
        first, second, third, last = (
            layer.kernel[...].astype(self.dtype)
            for layer in (self.conv1, self.conv2, self.conv3, self.proj)
        )
        x = _conv(_space_to_depth(images.astype(self.dtype)), _first_kernel(first), (2, 1), (1, 1))
        x = jax.nn.relu(self.bn1(x)).astype(self.dtype)
        x = _conv(x, _pair_kernel(second), (1, 1), (1, 1))
        x = jax.nn.relu(self.bn2(x)).astype(self.dtype)
        x = _conv(x, _pair_kernel(third), (1, 1), (1, 1))
        x = jax.nn.relu(self.bn3(x)).astype(self.dtype)
        size, _, width, dim = last.shape
        last = last.reshape(size, size // 2, 2 * width, dim)
        x = _conv(self._before_projection(x), last, strides=(size, size // 2))
        bias = self.proj.bias
        assert bias is not None
        return x + bias[...].astype(self.dtype)

    def _before_projection(self, x: jax.Array) -> jax.Array:
        return _unfused_gradient(x) if self.proj.out_features % 256 == 128 else x


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    rows: tuple[int, int] = (0, 0),
    columns: tuple[int, int] = (0, 0),
    strides: tuple[int, int] = (1, 1),
) -> jax.Array:
    """Convolves x [B, h, w, C] with a kernel; `rows` and `columns` are the padding on each side."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, (rows, columns), dimension_numbers=layout
    )


def _space_to_depth(images: jax.Array) -> jax.Array:
    """Reshapes images [B, H, W, 3] to [B, H/2, W/4, 24], by blocks of 2 rows and 4 columns."""
    batch, height, width, channels = images.shape
    blocks = images.reshape(batch, height // 2, 2, width // 4, 4, channels)
    return blocks.swapaxes(2, 3).reshape(batch, height // 2, width // 4, 8 * channels)


def _first_kernel(kernel: jax.Array) -> jax.Array:
    """Returns the kernel [4, 3, 24, 2·D] on blocks of pixels of a 7×7 one [7, 7, 3, D] of stride 2.

    Its rows are those of blocks y-2 to y+1, its columns those of blocks x-1 to x+1; the second
    pixel of a pair is two columns to the right of the first.
    """
    channels, width = kernel.shape[2:]
    first, second = (
        jnp.pad(kernel, ((1, 0), (1 + shift, 4 - shift), (0, 0), (0, 0))) for shift in (0, 2)
    )
    blocks = jnp.stack([first, second], axis=-2).reshape(4, 2, 3, 4, channels, 2 * width)
    return blocks.swapaxes(1, 2).reshape(4, 3, 8 * channels, 2 * width)


def _pair_kernel(kernel: jax.Array) -> jax.Array:
    """Returns the kernel [3, 3, 2·C, 2·D] on pairs of pixels of a 3×3 one [3, 3, C, D]."""
    channels, width = kernel.shape[2:]
    first, second = (
        jnp.pad(kernel, ((0, 0), (1 + shift, 2 - shift), (0, 0), (0, 0))) for shift in (0, 1)
    )
    return jnp.stack([first, second], axis=-2).reshape(3, 3, 2 * channels, 2 * width)


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
