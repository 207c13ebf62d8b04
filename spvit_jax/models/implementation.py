"""Choice of the implementation of attention: XLA's products, or a kernel of `spvit_jax.kernels`.

A further implementation is a name in `Implementation`, a case in `choose`, and a case in
`Attention._attend_heads`; a further platform's "fused" is a case in `choose` and `fused_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp

from spvit_jax.errors import InputError
from spvit_jax.kernels import fused, fused_gpu, fused_local
from spvit_jax.kernels.local import Grid, Radius
from spvit_jax.kernels.plan import Plan

Implementation = Literal["auto", "xla", "local", "fused", "fused_interpret"]

_KERNELS = ("local", "fused", "fused_interpret")
_FUSED_PLATFORMS = ("tpu", "gpu")
# Number of tokens from which masked heads are faster at linear cost: on CPUs as measured by
# `benchmarks.local_attention`; elsewhere about where, on a TPU v5e, the bundles of `fused_local`
# for a head become fewer than those of `fused` (576 tokens take both about a microsecond).
_LOCAL_FROM = {"cpu": 150}
_LOCAL_FROM_ELSEWHERE = 700
# Number of images on a device from which `fused_local`, whose lanes are images, is faster than XLA.
_FUSED_LOCAL_FROM = 32


def choose(
    requested: Implementation, qkv: jax.Array, num_heads: int, num_factors: int
) -> Implementation:
    """Returns the implementation that computes an attention: never "auto".

    Args:
      requested: a name, or "auto" for the fastest on the devices of the program being traced;
        "local" is about masked heads alone, and "auto" for others.
      qkv: queries, keys and values [B, N, 3D].
      num_heads: number of heads H.
      num_factors: number of factors [H, N, N] that scores have or may have: of G, of B.

    Raises:
      InputError: the implementation does not run on the devices, or not for so many tokens, or
        not in a width or dtype.
    """
    is_choice = requested in ("auto", "local")
    if requested == "xla" or (is_choice and platform() not in _FUSED_PLATFORMS):
        return "xla"  # without a plan, for which the number of images would have to be known
    num_tokens, head_dim = qkv.shape[1], qkv.shape[2] // 3 // num_heads
    if platform() == "gpu":
        return _choose_on_gpu(requested, qkv, head_dim)
    fits = Plan.of(qkv, num_heads, num_factors).fits
    if is_choice:
        return "fused" if fits and fused.supports(head_dim, qkv.dtype) else "xla"
    check_platform(requested, platform())
    if not fits:
        raise InputError(
            f"attention is {requested!r} on {num_tokens} tokens with {num_heads} heads of width "
            f"{head_dim}, for which the kernel needs too much of a chip's fast memory; choose "
            "'auto' or 'xla', or smaller images"
        )
    return requested


def _choose_on_gpu(requested: Implementation, qkv: jax.Array, head_dim: int) -> Implementation:
    """Returns what `choose` does on GPUs, where "xla" is not requested."""
    if requested == "fused_interpret":
        return requested
    has_devices = fused_gpu.runs_on_these_devices()
    supported = fused_gpu.supports(head_dim, qkv.dtype)
    if requested != "fused":
        is_known = isinstance(qkv.shape[0], int)  # in an exported program it is a name
        return "fused" if has_devices and supported and is_known else "xla"
    if not has_devices:
        raise InputError(
            "attention is 'fused', on GPUs a kernel for NVIDIA's of compute capability 8.0 or "
            "more, which these are not; choose 'auto' or 'xla'"
        )
    if not supported:
        _refuse(requested, head_dim, qkv.dtype, fused_gpu, "GPUs")
    return requested


def fused_kernel() -> ModuleType:
    """Returns the module with "fused" on the devices of the program; of TPUs if it has none."""
    return fused_gpu if platform() == "gpu" else fused


def is_local(requested: Implementation, num_tokens: int) -> bool:
    """Returns whether masked heads are computed at a cost linear in the number of tokens.

    Args:
      requested: as in `choose`.
      num_tokens: number of tokens, prefix included.
    """
    if requested == "auto":
        return num_tokens >= _LOCAL_FROM.get(platform(), _LOCAL_FROM_ELSEWHERE)
    return requested == "local"


def runs_fused_local(qkv: jax.Array, grid: Grid, num_prefix: int, radius: Radius) -> bool:
    """Returns whether local heads without a learned gain run as a kernel for TPUs.

    Args:
      qkv: queries, keys and values [B, 3, H, d, P+N].
      grid: rows and columns of patches (h, w).
      num_prefix: number P of prefix tokens.
      radius: (rows, columns) of the neighbourhood.
    """
    if platform() != "tpu" or num_prefix:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    images = qkv.shape[0] if mesh.empty else qkv.shape[0] // mesh.size
    return images >= _FUSED_LOCAL_FROM and fused_local.supports(
        grid, radius, qkv.shape[3], qkv.dtype
    )


def platform() -> str:
    """Returns the platform that a program is traced for: that of the mesh in context, if any."""
    # Not of this process's devices: `preflight` compiles for TPUs in a process on a CPU.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_platform(requested: Implementation, platform: str) -> None:
    """Raises an `InputError` if an implementation does not run on a platform such as "cpu"."""
    if requested == "fused" and platform not in _FUSED_PLATFORMS:
        raise InputError(
            "attention is 'fused', a kernel for TPUs and one for GPUs, and the devices are "
            f"{platform.upper()}s; choose 'auto' or 'xla', or for tests 'fused_interpret', which "
            "runs it slowly anywhere"
        )


def check(
    requested: Implementation,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    other_scores: str | None = None,
) -> None:
    """Checks that an implementation computes what a layer of attention needs.

    Args:
      requested: as in `choose`.
      head_dim: width d of a head.
      dtype: dtype of the computation.
      other_scores: what the layer does to scores beside a gain and a bias that are the same for
        all images, in words; None for nothing.

    Raises:
      InputError: it does not.
    """
    if requested not in _KERNELS:
        return
    if other_scores is not None:
        raise InputError(
            f"attention is {requested!r}, a kernel that does not know {other_scores}; "
            "choose 'auto' or 'xla'"
        )
    if requested != "local" and not fused.supports(head_dim, dtype):
        _refuse(requested, head_dim, dtype, fused)


def _refuse(
    requested: Implementation,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    kernel: ModuleType,
    platforms: str = "",
) -> NoReturn:
    """Raises an `InputError` about heads of a width in a dtype, with those that a kernel knows."""
    widths, dtypes = kernel.HEAD_DIMS, " or ".join(kernel.DTYPES)
    known = f"{widths[0]} to {widths[-1]}" if isinstance(widths, range) else _words(widths)
    raise InputError(
        f"attention is {requested!r} on heads of width {head_dim} in {jnp.dtype(dtype)}; the "
        f"kernel {platforms and f'for {platforms} '}knows widths of {known} in {dtypes}: choose "
        "'auto' or 'xla'"
    )


def _words(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
