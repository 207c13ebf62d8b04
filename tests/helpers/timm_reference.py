"""timm, which several tests compare with, imported past a torchvision that is built for CUDA."""

import torch

# The registry's torchvision wants two operators that a CPU build of torch lacks; none is called.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _schema in ("nms", "qnms"):
    _OPERATORS.define(f"{_schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import timm.scheduler  # noqa: E402
from timm.data import Mixup, auto_augment, create_transform  # noqa: E402
from timm.data.mixup import cutmix_bbox_and_lam  # noqa: E402
from timm.data.transforms import RandomResizedCropAndInterpolation  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402

__all__ = [
    "InterpolationMode",
    "Mixup",
    "RandomResizedCropAndInterpolation",
    "auto_augment",
    "create_transform",
    "cutmix_bbox_and_lam",
    "timm",
    "transforms",
]
