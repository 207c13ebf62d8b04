"""timm, which several tests compare with, imported past a torchvision that is built for CUDA."""

import torch

# The registry's torchvision wants two operators that a CPU build of torch lacks; none is called.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _schema in ("nms", "qnms"):
    _OPERATORS.define(f"{_schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from timm.data import auto_augment  # noqa: E402

__all__ = ["auto_augment", "timm"]
