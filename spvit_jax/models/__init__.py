"""The registry of models: `create_model("spvit_s", image_size=384)`, `list_models("spvit*")`.

This module holds names and settings only; the architectures are in the files beside it. Nothing
here or below imports TensorFlow: models run on a bare JAX machine.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from spvit_jax.errors import InputError, nearest
from spvit_jax.models import aliases
from spvit_jax.models.base import Model, ModelConfig, Outputs
from spvit_jax.models.cait import CaiT, CaiTConfig
from spvit_jax.models.fields import read_field, read_image_size
from spvit_jax.models.mait_pyramid import MaiTPyramid, MaiTPyramidConfig
from spvit_jax.models.swin import Swin, SwinConfig
from spvit_jax.models.vit import ViT, ViTConfig

__all__ = [
    "FAMILIES",
    "CaiT",
    "CaiTConfig",
    "EvaluationProtocol",
    "MaiTPyramid",
    "MaiTPyramidConfig",
    "Model",
    "ModelConfig",
    "Outputs",
    "Swin",
    "SwinConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "evaluation_protocol",
    "field_types",
    "from_dict",
    "list_models",
    "model_config",
    "read_image_size",
    "register_model",
    "registered_name",
]

FAMILIES: list[type[ModelConfig]] = [ViTConfig, CaiTConfig, SwinConfig, MaiTPyramidConfig]


def _deit(dim: int, num_heads: int, *, distilled: bool = False) -> ViTConfig:
    return ViTConfig(dim=dim, num_heads=num_heads, distilled=distilled, drop_path=0.1)


def _lvvit(
    depth: int,
    dim: int,
    num_heads: int,
    drop_path: float,
    *,
    stem_width: int = 64,
    skip_lam: float = 2.0,
    spatial_layers: int | None = None,
) -> ViTConfig:
    """Returns the configuration of an LV-ViT, or of an SP-ViT if `spatial_layers` is given."""
    return ViTConfig(
        depth=depth,
        dim=dim,
        num_heads=num_heads,
        drop_path=drop_path,
        stem_width=stem_width,
        skip_lam=skip_lam,
        spatial_layers=spatial_layers or 0,
        pos_conv=spatial_layers is not None,
        mlp_ratio=3.0,
        qkv_bias=False,
        norm_eps=1e-5,
        dense_head=True,
    )


def _mait(dim: int, num_heads: int, *, layer_scale: float | None = None) -> ViTConfig:
    return ViTConfig(
        depth=24,
        dim=dim,
        num_heads=num_heads,
        masked_heads="thirds",
        layer_scale=layer_scale,
        drop_path=0.1,
    )


def _cait(
    dim: int, num_heads: int, depth: int, drop_path: float, *, layer_scale: float = 1e-5
) -> CaiTConfig:
    return CaiTConfig(
        dim=dim, num_heads=num_heads, depth=depth, drop_path=drop_path, layer_scale=layer_scale
    )


def _swin(dim: int, num_heads: int, depth: int, drop_path: float) -> SwinConfig:
    return SwinConfig(dim=dim, num_heads=num_heads, depths=(2, 2, depth, 2), drop_path=drop_path)


def _mait_pyramid(dim: int, num_heads: int, depth: int, drop_path: float) -> MaiTPyramidConfig:
    depths = (2, 2, depth, 2)
    return MaiTPyramidConfig(dim=dim, num_heads=num_heads, depths=depths, drop_path=drop_path)


_MODELS: dict[str, ModelConfig] = {
    "deit_ti": _deit(192, 3),
    "deit_s": _deit(384, 6),
    "deit_b": _deit(768, 12),
    "deit_ti_distilled": _deit(192, 3, distilled=True),
    "deit_s_distilled": _deit(384, 6, distilled=True),
    "deit_b_distilled": _deit(768, 12, distilled=True),
    "lvvit_t": _lvvit(12, 240, 4, 0.1, skip_lam=1.0),
    "lvvit_s": _lvvit(16, 384, 6, 0.1),
    "lvvit_m": _lvvit(20, 512, 8, 0.2),
    "lvvit_l": _lvvit(24, 768, 12, 0.3, stem_width=128, skip_lam=3.0),
    "spvit_s": _lvvit(16, 384, 6, 0.1, spatial_layers=14),
    "spvit_m": _lvvit(20, 512, 8, 0.2, spatial_layers=10),
    "spvit_l": _lvvit(24, 768, 12, 0.3, stem_width=128, skip_lam=3.0, spatial_layers=22),
    "mait_xt": _mait(144, 3),
    "mait_t": _mait(192, 3),
    "mait_xs": _mait(288, 3),
    "mait_s": _mait(384, 6),
    "mait_s_layerscale": _mait(384, 6, layer_scale=1e-5),
    "cait_xxs24": _cait(192, 4, 24, 0.05),
    "cait_xxs36": _cait(192, 4, 36, 0.1),
    "cait_xs24": _cait(288, 6, 24, 0.05),
    "cait_s24": _cait(384, 8, 24, 0.1),
    "cait_s36": _cait(384, 8, 36, 0.2, layer_scale=1e-6),
    "cait_m36": _cait(768, 16, 36, 0.3, layer_scale=1e-6),
    "cait_m48": _cait(768, 16, 48, 0.4, layer_scale=1e-6),
    "swin_t": _swin(96, 3, 6, 0.2),
    "swin_s": _swin(96, 3, 18, 0.3),
    "swin_b": _swin(128, 4, 18, 0.5),
    "swin_l": _swin(192, 6, 18, 0.2),
    "mait_pyramid_t": _mait_pyramid(96, 3, 6, 0.2),
    "mait_pyramid_s": _mait_pyramid(96, 3, 18, 0.3),
    "mait_pyramid_b": _mait_pyramid(128, 4, 18, 0.5),
}


class EvaluationProtocol(NamedTuple):
    """Resizing and cropping of evaluation images by a model's authors, apart from the size.

    Attributes:
      crop: fraction of the resized image's side that the centre crop keeps.
      interpolation: filter of the resizing, "bilinear" or "bicubic".
      crop_mode: "center", or "squash" where the image loses its proportions.
    """

    crop: float
    interpolation: str = "bicubic"
    crop_mode: str = "center"


# (pattern of names, protocol below 384 pixels, protocol from there on); the first match counts.
_EVALUATION_PROTOCOLS = (
    *(
        (pattern, EvaluationProtocol(crop), EvaluationProtocol(crop))
        for pattern, crop in (
            ("deit_*", 0.875),
            ("mait_*", 0.875),
            ("lvvit_[ml]", 1.0),
            ("lvvit_*", 0.9),
            ("spvit_[ml]", 1.0),
            ("spvit_*", 0.9),
            ("cait_*", 1.0),
        )
    ),
    # Microsoft's `data/build.py` and `TEST.CROP: False` at 384; timm crops 0.9 and 1.0.
    ("swin_*", EvaluationProtocol(0.875), EvaluationProtocol(1.0, crop_mode="squash")),
)


# Fields that a model of a name may have of any value: sizes, and how it runs or is trained.
_NOT_OF_A_NAME = (
    *("image_size", "num_classes"),
    *("drop_path", "dtype", "attention", "remat", "scan"),
)
_OWN_PROTOCOLS: dict[str, EvaluationProtocol] = {}  # of models that `register_model` adds


def register_model(
    name: str, config: ModelConfig, protocol: EvaluationProtocol = EvaluationProtocol(0.875)
) -> None:
    """Adds a model to the registry, by whose name commands and `create_model` find it.

    Args:
      name: name of the model, which must be new.
      config: configuration of the model at 224 pixels and 1000 classes; of a family of this package
        or of another subclass of `ModelConfig`, whose fields then are fields of `config.model` too.
      protocol: evaluation protocol at every image size.

    Raises:
      InputError: the name is taken by another model, or the family's by another class.
    """
    if name in _MODELS:
        if config != _MODELS[name]:
            raise InputError(f"there is a model {name!r} already; give yours another name")
        return
    family = type(config)
    if family not in FAMILIES:
        if family.__name__ in {known.__name__ for known in FAMILIES}:
            raise InputError(
                f"there is a family {family.__name__!r} already; give your class another name"
            )
        FAMILIES.append(family)
    _MODELS[name] = config
    _OWN_PROTOCOLS[name] = protocol


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of the models that match a shell pattern such as "spvit*"."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def registered_name(config: ModelConfig) -> str | None:
    """Returns the name of a model at any image size and number of classes; None if it has none."""

    def essence(model: ModelConfig) -> dict[str, Any]:
        fields = model.to_dict().items()
        return {field: value for field, value in fields if field not in _NOT_OF_A_NAME}

    wanted = essence(config)
    return next((name for name in list_models() if essence(_MODELS[name]) == wanted), None)


def evaluation_protocol(name: str, image_shape: tuple[int, int]) -> EvaluationProtocol:
    """Returns the evaluation protocol of a named model at an image shape (height, width) in pixels.

    It is that of the model's authors, by which the accuracies of their papers were
    measured; timm's differs for Swin.

    Raises:
      InputError: the name is unknown.
    """
    name = _known_name(name)
    if name in _OWN_PROTOCOLS:
        return _OWN_PROTOCOLS[name]
    small, large = next(
        protocols for pattern, *protocols in _EVALUATION_PROTOCOLS if fnmatch.fnmatch(name, pattern)
    )
    return large if min(image_shape) >= 384 else small


def model_config(
    name: str,
    *,
    image_size: int | tuple[int, int] | str | None = None,
    num_classes: int = 1000,
    **overrides: Any,
) -> ModelConfig:
    """Returns the configuration of a named model with some of its fields replaced.

    Args:
      name: one of `list_models()`, or timm's name of it, such as "deit_base_patch16_384".
      image_size: pixels: one number, (height, width), or a text such as "160x256"; None is 224, or
        what timm's name says.
      num_classes: number of classes C.
      **overrides: fields of the model's configuration, such as `ViTConfig`'s.

    Raises:
      InputError: the name or a field is unknown, or the fields contradict each other.
    """
    alias = aliases.resolve(name)
    base = _MODELS[_known_name(name)]
    if image_size is None:
        image_size = alias.image_size if alias else 224
    fields = [field.name for field in dataclasses.fields(base)]
    for field in overrides:
        if field not in fields:
            raise InputError(f"model {name!r} has no field {field!r}{nearest(field, fields)}")
    settings = {"image_size": image_size, "num_classes": num_classes, **overrides}
    return dataclasses.replace(base, **{k: read_field(k, v) for k, v in settings.items()})


def field_types() -> dict[str, type]:
    """Returns the type of each field that the configuration of some family has, by name.

    The type is `object` where values of several are possible; None stands for a field's default
    everywhere. The number of classes is the data's and no choice.
    """
    kinds: dict[str, type] = {}
    for family in FAMILIES:
        for name, hint in typing.get_type_hints(family).items():
            options = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
            is_tuple = typing.get_origin(hint) is tuple
            kinds[name] = tuple if is_tuple else options[0] if len(options) == 1 else object
    del kinds["num_classes"]
    return kinds


def from_dict(fields: Mapping[str, Any], where: object = "a file") -> ModelConfig:
    """Returns the model configuration whose `to_dict` gave these fields, directly or through JSON.

    Args:
      fields: fields and family, as `ModelConfig.to_dict` returns them.
      where: origin of the fields, for an error.

    Raises:
      InputError: the fields are not those of a model of this version, or no model can have them.
    """
    families = {family.__name__: family for family in FAMILIES}
    try:
        settings = {name: read_field(name, v) for name, v in fields.items() if name != "family"}
        return families[fields["family"]](**settings)
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"settings of a model cannot be read from {where}: {str(error)[:300]}"
        ) from error


def create_model(
    name: str,
    *,
    image_size: int | tuple[int, int] | str | None = None,
    num_classes: int = 1000,
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> Model:
    """Creates a model by name, in evaluation mode.

    Args:
      name: one of `list_models()`, or timm's name of it, such as "deit_base_patch16_384".
      image_size: pixels: one number, (height, width), or a text such as "160x256"; None is 224, or
        what timm's name says.
      num_classes: number of classes C.
      rngs: random keys of the initial weights; `nnx.Rngs(0)` if not given.
      **overrides: fields of the model's configuration, such as `ViTConfig`'s.

    Returns:
      A module whose call maps [B, height, width, 3] normalised images to logits [B, C].

    Raises:
      InputError: as `model_config`.
    """
    config = model_config(name, image_size=image_size, num_classes=num_classes, **overrides)
    return config.build(rngs if rngs is not None else nnx.Rngs(0))


def _known_name(name: str) -> str:
    """Returns the name of a model here, for itself or for timm's name of it."""
    alias = aliases.resolve(name)
    if alias is not None:
        return alias.name
    if name not in _MODELS:
        raise InputError(f"unknown model {name!r}{nearest(name, [*_MODELS, *aliases.ALIASES])}")
    return name
