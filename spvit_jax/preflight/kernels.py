"""Kernels (Pallas) in a compiled program, and the cost that their authors state.

To the compiler a kernel is a custom call, of which it knows neither operations nor cycles. What a
kernel was compiled to is read by `bundles.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from spvit_jax.preflight.hlo import Instruction


class CostEstimate(NamedTuple):
    """The `pallas.CostEstimate` of a kernel.

    Attributes:
      flops: FLOPs, two per multiply-add.
      transcendentals: number of exponentials and the like.
      bytes: bytes that it reads from HBM and writes there.
    """

    flops: int
    transcendentals: int
    bytes: int


def is_kernel(instruction: Instruction) -> bool:
    """Returns whether an instruction runs a kernel."""
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def cost_estimate(instruction: Instruction) -> CostEstimate | None:
    """Returns the stated cost of a kernel; None without one, and for other instructions."""
    if not is_kernel(instruction):
        return None
    found = re.search(r'"cost_estimate":\{([^{}]*)\}', instruction.attributes)
    if found is None:
        return None
    fields = {name: int(value) for name, value in re.findall(r'"(\w+)":"?(\d+)', found[1])}
    return CostEstimate(
        fields.get("flops", 0), fields.get("transcendentals", 0), fields.get("bytes_accessed", 0)
    )
