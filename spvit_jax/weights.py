"""Weights from wherever they are: an own checkpoint, or a file of PyTorch, at any resolution.

What the commands share that begin with somebody's weights: evaluation, fine-tuning, conversion.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spvit_jax.errors import InputError
from spvit_jax.interop import files
from spvit_jax.interop.translate import to_ours
from spvit_jax.models import ModelConfig, ViTConfig, from_dict
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.models.naming import map_named, named_leaves
from spvit_jax.models.resize import adapt, check_adaptable, check_classes
from spvit_jax.training import checkpoint, sharding
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
      is_average: whether they are a moving average.
    """

    where: str
    config: ModelConfig
    read: Callable[[Mesh, str], Mapping[str, Any]]
    is_average: bool

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
        like, shardings = plan(model, mesh, preset)

        def make(arrays: Mapping[str, jax.Array]) -> Variables:
            adapted = adapt(arrays, self.config, model, self.where)
            return map_named(lambda name, _: adapted[_inside(name)], like)

        arrays = {name: jnp.asarray(array) for name, array in self.read(mesh, preset).items()}
        with warnings.catch_warnings():
            # What is resized or placed elsewhere is copied; the rest need not be there twice.
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            return jax.jit(make, out_shardings=shardings, donate_argnums=0)(arrays)


def find(
    path: pathlib.Path, like: ModelConfig | None, *, which: str = "best", weights: str = "auto"
) -> Weights:
    """Finds weights and what model they are of, and says which of several it took.

    Args:
      path: a workdir of training, one checkpoint in it, a `.pth` or a `.safetensors` file.
      like: the model that they are expected to be of, up to resolution, classes and layer kinds;
        may be None where they say that themselves: in what this project has written.
      which: "best", "last" or a step, where the path is a workdir.
      weights: "model" for the weights themselves, "ema" for their moving average, or "auto" for
        the average where there is one: it is what training evaluates, here as in the recipes that
        files of PyTorch are from, and what timm's `load_checkpoint` takes.

    Raises:
      InputError: there are no such weights, they cannot be read, or they are of another model.
    """
    if not files.is_file_of_weights(path):
        directory = checkpoint.find(path, which=which)
        taken, has_average = checkpoint.choose(directory, weights)
        _say_which(directory, taken == "ema", has_average)
        fields = checkpoint.model_of(directory)
        config = _known(like if fields is None else from_dict(fields, path), path)

        def read(mesh: Mesh, preset: str) -> Mapping[str, Any]:
            shapes, _ = plan(config, mesh, preset)
            variables = checkpoint.load_variables(directory, shapes, weights=taken)
            return arrays_of(variables)

        return Weights(str(directory), config, read, taken == "ema")

    state_dict, note, is_average, has_average = files.read(path, weights=weights)
    _say_which(path, is_average, has_average)
    config = _known(like if note is None else from_dict(note, path), path)
    config, arrays = to_ours(state_dict, config, path)
    return Weights(str(path), config, lambda mesh, preset: arrays, is_average)


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


def _say_which(where: object, is_average: bool, has_average: bool) -> None:
    if is_average:
        text = "its moving average is taken; --weights=model takes the weights themselves"
    elif has_average:
        text = "the weights themselves are taken, not its moving average"
    else:
        text = "it has no moving average; the weights themselves are taken"
    log.warning("note: %s: %s", where, text)


def arrays_of(variables: Variables) -> dict[str, Any]:
    """Returns a model's arrays under their names, as `naming.arrays_of` does of a module."""
    return {_inside(name): leaf for name, leaf in named_leaves(variables).items()}


def plan(model: ModelConfig, mesh: Mesh, preset: str) -> tuple[Variables, Variables]:
    """Returns a model's variables as shapes with shardings, and the shardings alone."""
    return sharding.plan(lambda: Variables.of(model.build(CountedRngs(0))), mesh, preset)


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
