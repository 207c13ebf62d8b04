"""Folders of weights as timm loads them from the Hugging Face hub: weights, settings, model card.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads one from a disk, and
`timm.create_model("hf-hub:OWNER/REPO", pretrained=True)` one that was uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.numpy
from etils import epath

from spvit_jax import atomic
from spvit_jax.errors import InputError, writing
from spvit_jax.interop.tensors import StateDict
from spvit_jax.models import ModelConfig, evaluation_protocol, model_config, registered_name
from spvit_jax.models.aliases import resolve, timm_name
from spvit_jax.models.complexity import count_macs, count_parameters

CONFIG = "config.json"


def architecture_of(folder: epath.Path) -> ModelConfig | None:
    """Returns the model that a folder's `config.json` describes; None if it says nothing of one."""
    try:
        fields = json.loads((folder / CONFIG).read_text())
        name, classes = fields["architecture"], int(fields.get("num_classes", 1000))
        _, height, width = fields.get("pretrained_cfg", fields).get("input_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if resolve(str(name)) is None:
        return None
    size = height if height == width else (height, width)
    return model_config(name, num_classes=classes, image_size=size)


def write(
    folder: epath.Path,
    state_dict: Callable[[], StateDict],
    config: ModelConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a folder that timm loads, completely or not at all.

    Args:
      folder: folder to write, which must not exist.
      state_dict: returns the arrays under timm's names, once it is known that timm has the model.
      config: configuration of the model.
      mean: mean of each channel by which images are normalised, on a scale of 0 to 1.
      std: standard deviation of each channel, likewise.
      class_names: names of the classes by number, if known.

    Raises:
      InputError: timm has no such model.
      WriteError: the folder cannot be written.
    """
    name = registered_name(config)
    architecture = None if name is None else timm_name(name, config.image_shape)
    if name is None or architecture is None:
        raise InputError(
            f"timm has no {name or 'model of these settings'}; it has DeiT, CaiT and Swin as in "
            "the registry. Of others write a file, without --hub_format: --output=FILE.safetensors"
        )
    protocol = evaluation_protocol(name, config.image_shape)
    settings: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": config.num_classes,
        "pretrained_cfg": {
            "input_size": [3, *config.image_shape],
            "fixed_input_size": True,
            "interpolation": protocol.interpolation,
            "crop_pct": protocol.crop,
            "crop_mode": protocol.crop_mode,
            "mean": list(mean),
            "std": list(std),
            "num_classes": config.num_classes,
        },
    }
    alias = resolve(architecture)
    if alias is not None and (alias.image_size,) * 2 != config.image_shape:
        settings["model_args"] = {"img_size": list(config.image_shape)}
    if class_names:
        settings["label_names"] = list(class_names)
    with writing(folder), atomic.making_folder(folder) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        weights = safetensors.numpy.save(state_dict(), metadata={"format": "pt"})
        (temporary / "model.safetensors").write_bytes(weights)
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        (temporary / "README.md").write_text(_model_card(name, architecture, config, class_names))


def _model_card(
    name: str, architecture: str, config: ModelConfig, class_names: Sequence[str] | None
) -> str:
    """Returns a model card with what is known; what is not is left for the owner to say."""
    height, width = config.image_shape
    classes = f"{config.num_classes}"
    if class_names:
        shown = ", ".join(class_names[:10])
        classes += f": {shown}{', …' if len(class_names) > 10 else ''}"
    return f"""---
library_name: timm
tags:
- image-classification
- timm
- spvit_jax
---

# {architecture}

`{name}` of spvit_jax, as a model of timm.

| | |
|---|---|
| image | {height}×{width} pixels |
| parameters | {count_parameters(config):,} |
| GMACs | {count_macs(config) / 1e9:.2f} |
| classes | {classes} |

Data, licence and accuracy are not known to the program that wrote this; add them.
"""
