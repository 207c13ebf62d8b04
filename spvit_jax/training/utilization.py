"""Model FLOPs utilization (MFU): how much of the devices' peak a run's model computes."""

from __future__ import annotations

from jax.sharding import Mesh

from spvit_jax.models import ModelConfig
from spvit_jax.models.complexity import count_macs

# Peak bfloat16 FLOPs/s, two per multiply-add, without sparsity, by JAX's name of a device. TPUs:
# as preflight.topology.CHIPS, which names the pages. GPUs: NVIDIA's data sheets of H100 and A100.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def train_flops(model: ModelConfig) -> float:
    """Returns the FLOPs of training on one image: those of the forward pass, and twice them back.

    What is recomputed (remat) and what a teacher computes does not count, as usual for MFU.
    """
    return 3 * 2.0 * count_macs(model)


def peak_images_per_second(model: ModelConfig, mesh: Mesh) -> float | None:
    """Returns the images per second at which MFU is 1; None where the devices' peak is unknown."""
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size / train_flops(model)
