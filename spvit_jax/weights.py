"""Weights from wherever they are: an own checkpoint, or a file of PyTorch, at any resolution.

What the commands share that begin with somebody's weights: evaluation, fine-tuning, conversion.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from spvit_jax.errors import InputError
from spvit_jax.interop import files
from spvit_jax.interop.translate import to_ours
from spvit_jax.models import ModelConfig, ViTConfig, from_dict
from spvit_jax.models.naming import map_named, named_leaves
from spvit_jax.models.resize import adapt, check_adaptable, check_classes
from spvit_jax.training import checkpoint
from spvit_jax.training.run import abstract_variables
from spvit_jax.training.state import Variables

log = logging.getLogger("spvit_jax")

# Fields of a model that its weights do not show.
_FUNCTION = (
    *("masked_heads", "mask_radius", "mask_kind", "prior_extent"),
    *("norm_eps", "skip_lam", "num_heads"),
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that have been found, and the model they are of.

    Attributes:
      where: the file or the checkpoint.
      config: the model, as it was trained.
      read: reads the arrays under their names onto a mesh, by a preset of shardings.
    """

    where: str
    config: ModelConfig
    read: Callable[[Mesh, str], Mapping[str, Any]]

    def fit(self, model: ModelConfig) -> ModelConfig:
        """Returns the model with the kinds of layers that the weights have.

        SP-ViT's authors trained with several numbers of SP-SA layers, L with none.
        """
        kinds = _kinds_of_layers(self.config)
        if not isinstance(model, ViTConfig) or kinds is None or max(kinds) >= model.depth:
            return model
        return dataclasses.replace(model, spatial_layers=kinds[0], class_token_layer=kinds[1])

    def check(self, model: ModelConfig, *, new_head: bool = False) -> None:
        """Raises an `InputError` unless `load` can make the weights those of the model."""
        check_classes(self.config, model, self.where, may_replace=new_head)
        kinds = _kinds_of_layers(self.config)
        if kinds is not None and _kinds_of_layers(self.fit(model)) != _kinds_of_layers(model):
            raise InputError(
                f"{self.where} has SP-SA in {kinds[0]} layers and the class token from layer "
                f"{kinds[1]} on, which the model has not; set config.model.spatial_layers="
                f"{kinds[0]} and config.model.class_token_layer={kinds[1]}"
            )
        check_adaptable(self.config, model, self.where)
        for difference in self._differences(model):
            log.warning("warning: %s was trained with %s", self.where, difference)

    def _differences(self, model: ModelConfig) -> list[str]:
        """Lists what changes the model's function and does not show in its weights."""
        trained, asked = self.config.to_dict(), model.to_dict()
        return [
            f"{field} {trained[field]}, and {asked[field]} is asked for"
            for field in _FUNCTION
            if field in trained and trained[field] != asked[field]
        ]

    def load(self, model: ModelConfig, mesh: Mesh, *, preset: str = "replicated") -> Variables:
        """Reads the weights and resizes them to the model's resolution.

        Args:
          model: for which `check` has passed. A head for other classes is new.
          mesh: the devices.
          preset: of `sharding.PRESETS`.

        Raises:
          InputError: the weights are damaged.
        """
        like, shardings = abstract_variables(model, mesh, preset)

        def make(arrays: Mapping[str, jax.Array]) -> Variables:
            adapted = adapt(arrays, self.config, model, self.where)
            return map_named(lambda name, _: adapted[_inside(name)], like)

        return jax.jit(make, out_shardings=shardings)(dict(self.read(mesh, preset)))


def find(
    path: pathlib.Path, like: ModelConfig | None, *, which: str = "best", weights: str = "auto"
) -> Weights:
    """Finds weights and what model they are of.

    Args:
      path: a workdir of training, one checkpoint in it, a `.pth` or a `.safetensors` file.
      like: the model that they are expected to be of, up to resolution, classes and layer kinds;
        may be None where they say that themselves: in what this project has written.
      which: "best", "last" or a step, where the path is a workdir.
      weights: "model", "ema" for the moving average, or "auto": an own checkpoint's average
        where there is one, and in a file the weights themselves.

    Raises:
      InputError: there are no such weights, they cannot be read, or they are of another model.
    """
    if not files.is_file_of_weights(path):
        directory = checkpoint.find(path, which=which)
        fields = checkpoint.model_of(directory)
        config = _known(like if fields is None else from_dict(fields), path)

        def read(mesh: Mesh, preset: str) -> Mapping[str, Any]:
            shapes, _ = abstract_variables(config, mesh, preset)
            variables = checkpoint.load_variables(directory, shapes, weights=weights)
            return arrays_of(variables)

        return Weights(str(directory), config, read)

    state_dict, note = files.read(path, ema=weights == "ema")
    config = _known(like if note is None else from_dict(note), path)
    config, arrays = to_ours(state_dict, config, path)
    return Weights(str(path), config, lambda mesh, preset: arrays)


def find_fitting(
    path: pathlib.Path, model: ModelConfig, *, which: str = "best", weights: str = "auto"
) -> tuple[Weights, ModelConfig]:
    """Finds weights to run a model with, as `find`; the kinds of its layers are theirs.

    Returns:
      The weights, and the model for which `load` can be called.

    Raises:
      InputError: as `find` and `Weights.check`.
    """
    found = find(path, model, which=which, weights=weights)
    model = found.fit(model)
    found.check(model)
    return found, model


def arrays_of(variables: Variables) -> dict[str, Any]:
    """Returns a model's arrays under their names, as `naming.arrays_of` does of a module."""
    return {_inside(name): leaf for name, leaf in named_leaves(variables).items()}


def _kinds_of_layers(model: ModelConfig) -> tuple[int, int] | None:
    """Returns how many layers have SP-SA, and which the class token enters; None for no ViT."""
    return (model.spatial_layers, model.late) if isinstance(model, ViTConfig) else None


def _known(config: ModelConfig | None, path: pathlib.Path) -> ModelConfig:
    if config is None:
        raise InputError(f"{path} does not say what model it is of; name it with --arch")
    return config


def _inside(name: str) -> str:
    """Returns a leaf's name inside the model: without `params/` or `stats/`."""
    return name.partition("/")[2]
