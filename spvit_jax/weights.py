"""Pretrained weights, from a checkpoint of this project or a file of PyTorch, at any resolution.

Evaluation, fine-tuning and conversion read weights here, and in Python

    model = create_model("spvit_s", image_size=384)
    load_torch(model, "spvit_s_224.pth.tar")
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from spvit_jax import classes, paths
from spvit_jax.classes import ClassNames
from spvit_jax.errors import InputError
from spvit_jax.interop import files, hub, timm_folder
from spvit_jax.interop.containers import unwrap
from spvit_jax.interop.tensors import as_arrays
from spvit_jax.interop.translate import to_ours
from spvit_jax.models import Model, ModelConfig, ViTConfig, from_dict
from spvit_jax.models.naming import map_named, named_leaves, set_arrays, shapes_of
from spvit_jax.models.resize import adapt, check_adaptable, check_classes, check_heads
from spvit_jax.training import checkpoint, sharding
from spvit_jax.training.run import abstract_variables
from spvit_jax.training.state import Variables

log = logging.getLogger("spvit_jax")

# Fields that change what a model computes, and not the names or shapes of its weights.
_NOT_IN_WEIGHTS = (
    *("masked_heads", "mask_radius", "mask_kind", "prior_extent"),
    *("norm_eps", "skip_lam", "num_heads"),
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that have been found, with the configuration of their model.

    Attributes:
      where: path of the file or checkpoint.
      config: configuration of the model, as it was trained.
      read: returns the arrays by name, read onto a mesh with a preset of shardings.
      is_average: whether the weights are a moving average.
      missing_heads: names of the model's heads that the weights lack, as a backbone's do.
      class_names: names of the classes that the model was trained on, by number; None if not
        known.
    """

    where: str
    config: ModelConfig
    read: Callable[[Mesh, str], Mapping[str, Any]]
    is_average: bool
    missing_heads: frozenset[str] = frozenset()
    class_names: ClassNames | None = None

    def adopt_layer_kinds(self, model: ModelConfig) -> ModelConfig:
        """Returns a model's configuration with the kinds of layers that the weights have.

        SP-ViT's authors trained with several numbers of SP-SA layers, L with none.
        """
        kinds = _kinds_of_layers(self.config)
        if not isinstance(model, ViTConfig) or kinds is None or max(kinds) >= model.depth:
            return model
        if kinds == _kinds_of_layers(model):
            return model
        return dataclasses.replace(model, spatial_layers=kinds[0], class_token_layer=kinds[1])

    def check(
        self,
        model: ModelConfig,
        *,
        new_head: bool = False,
        class_names: ClassNames | None = None,
    ) -> None:
        """Checks that `load` can adapt the weights to a model; warns of differences in function.

        Args:
          model: configuration of the model.
          new_head: whether the model may get a new head for other classes.
          class_names: names of the model's classes, by number; None if not known.

        Raises:
          InputError: the weights are of another model or of other classes.
        """
        check_classes(self.config, model, self.where, may_replace=new_head)
        check_heads(self.missing_heads, self.where, may_replace=new_head)
        if class_names is not None and not new_head:
            self.check_class_names(
                class_names, "to begin with a new head, set config.init_new_head=True"
            )
        kinds = _kinds_of_layers(self.config)
        if kinds is not None and _kinds_of_layers(
            self.adopt_layer_kinds(model)
        ) != _kinds_of_layers(model):
            raise InputError(
                f"{self.where} has SP-SA in {kinds[0]} layers and the class token from layer "
                f"{kinds[1]} on, which the model has not; set config.model.spatial_layers="
                f"{kinds[0]} and config.model.class_token_layer={kinds[1]}"
            )
        check_adaptable(self.config, model, self.where)
        if self.missing_heads:
            log.warning("note: %s lacks %s: new", self.where, ", ".join(sorted(self.missing_heads)))
        for difference in self._differences(model):
            log.warning("warning: %s was trained with %s", self.where, difference)

    def _differences(self, model: ModelConfig) -> list[str]:
        """Lists the fields by which a model computes something else than the trained one."""
        trained, asked = self.config.to_dict(), model.to_dict()
        if self.config.masked_per_layer() == model.masked_per_layer():
            del trained["masked_heads"]  # the same, in whatever words
        return [
            f"{field} {trained[field]}, and {asked[field]} is asked for"
            for field in _NOT_IN_WEIGHTS
            if field in trained and trained[field] != asked[field]
        ]

    def check_class_names(self, class_names: ClassNames, advice: str) -> None:
        """Raises an `InputError` with advice if the weights were trained on other classes."""
        if self.class_names is not None:
            what = f"{self.where} was trained on other classes than those of the data"
            classes.check_same(self.class_names, class_names, what, advice)

    def load(
        self,
        model: ModelConfig,
        mesh: Mesh,
        *,
        preset: str = "replicated",
        class_names: ClassNames | None = None,
    ) -> Variables:
        """Reads the weights and resizes them to the model's resolution.

        Args:
          model: configuration that `check` has accepted. A head for other classes is new.
          mesh: mesh of the devices.
          preset: name in `sharding.PRESETS`.
          class_names: names of the model's classes; if the weights' differ, the head is new.

        Returns:
          The model's variables, on the mesh.

        Raises:
          InputError: the weights are damaged.
        """
        like, shardings = abstract_variables(model, mesh, preset)
        new_head = None not in (self.class_names, class_names) and self.class_names != class_names

        def make(arrays: Mapping[str, jax.Array]) -> Variables:
            adapted = adapt(arrays, self.config, model, self.where, new_head=new_head)
            return with_arrays(like, adapted)

        arrays = {name: jnp.asarray(array) for name, array in self.read(mesh, preset).items()}
        with warnings.catch_warnings():
            # What is resized or placed elsewhere is copied; the rest need not be there twice.
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            return jax.jit(make, out_shardings=shardings, donate_argnums=0)(arrays)


def find(
    source: epath.Path | Mapping[str, Any],
    like: ModelConfig | None,
    *,
    which: str = "best",
    weights: str = "auto",
) -> Weights:
    """Finds weights and the configuration of their model, and logs which of several it takes.

    Args:
      source: a workdir of training, one checkpoint in it, a file that `interop.files.read` takes,
        a name on the hub, `hf:OWNER/REPO`, or a state dict of tensors or arrays.
      like: configuration of the expected model, up to resolution, classes and layer kinds; may be
        None for checkpoints and files of this project, which hold it.
      which: checkpoint of a workdir: "best", "last" or a step.
      weights: "model" for the weights themselves, "ema" for their moving average, or "auto" for
        the average where there is one: it is what training evaluates, here as in the recipes that
        files of PyTorch are from, and what timm's `load_checkpoint` takes.

    Raises:
      InputError: there are no such weights, they cannot be read, or they are of another model.
    """
    if isinstance(source, Mapping):
        return _in_state_dict(source, like, weights)
    if hub.is_name(source):
        source = epath.Path(hub.download(str(source)))
    # A workdir may have been exported into itself.
    if checkpoint.newest(source) is not None or not files.is_file_of_weights(source):
        return _in_checkpoint(checkpoint.find(source, which=which), like, weights)
    return _in_file(source, like, weights)


def _in_state_dict(tree: Mapping[str, Any], like: ModelConfig | None, weights: str) -> Weights:
    where = "the state dict"
    found = unwrap(tree, where, weights=weights)
    if found.changes:
        log.warning("note: %s: %s", where, "; ".join(found.changes))
    if found.has_average:
        _log_which(where, found.is_average, found.has_average)
    arrays = as_arrays(found.tensors, where)
    return _of_torch(arrays, _known(like, where), where, is_average=found.is_average)


def _in_checkpoint(directory: epath.Path, like: ModelConfig | None, weights: str) -> Weights:
    taken, has_average = checkpoint.choose(directory, weights)
    _log_which(directory, taken == "ema", has_average)
    fields = checkpoint.model_of(directory)
    config = _known(like if fields is None else from_dict(fields, directory), directory)

    def read(mesh: Mesh, preset: str) -> Mapping[str, Any]:
        shapes, _ = abstract_variables(config, mesh, preset)
        return arrays_of(checkpoint.load_variables(directory, shapes, weights=taken))

    names = checkpoint.class_names_of(directory)
    return Weights(str(directory), config, read, taken == "ema", class_names=names)


def _in_file(path: epath.Path, like: ModelConfig | None, weights: str) -> Weights:
    if like is None:
        like = timm_folder.architecture_of(path if path.is_dir() else path.parent)
    contents = files.read(path, weights=weights)
    _log_which(path, contents.is_average, contents.has_average)
    config = _known(like if contents.note is None else from_dict(contents.note, path), path)
    return _of_torch(
        contents.state_dict,
        config,
        str(path),
        is_average=contents.is_average,
        holds_grid=contents.note is not None,
    )


def _of_torch(
    state_dict: files.StateDict,
    like: ModelConfig,
    where: str,
    *,
    is_average: bool,
    holds_grid: bool = False,
) -> Weights:
    """Returns the weights of a PyTorch state dict, expected to be of the model `like`."""
    config, arrays = to_ours(state_dict, like, where, may_lack_heads=True)
    height, width = config.grid
    side = math.isqrt(height * width)
    if "pos_embed" in arrays and not holds_grid and height != width and side**2 == height * width:
        log.warning(
            "note: %s does not say whether its %d patches are %d×%d, as in the model, or %d×%d",
            *(where, height * width, height, width, side, side),
        )
    missing = {name.partition("/")[0] for name in shapes_of(config).keys() - arrays.keys()}
    return Weights(where, config, lambda mesh, preset: arrays, is_average, frozenset(missing))


def load_torch(
    model: Model,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    weights: str = "auto",
    new_head: bool = False,
) -> None:
    """Loads weights into a model, resized to its resolution; the kinds of its layers become theirs.

    Args:
      model: model of the weights' architecture.
      source: file, folder or state dict of the weights, as in `find`.
      weights: "model", "ema" or "auto", as in `find`.
      new_head: whether heads that are missing or have another number of classes are new.

    Raises:
      InputError: as `find` and `Weights.check`; the model is left as it was.
    """
    source = source if isinstance(source, Mapping) else paths.parse(source)
    found = find(source, model.config, weights=weights)
    config = found.adopt_layer_kinds(model.config)
    found.check(config, new_head=new_head)
    arrays = found.read(sharding.make_mesh(-1, 1), "replicated")
    adapted = adapt(arrays, found.config, config, found.where)
    if config != model.config:
        log.warning("note: the kinds of the model's layers are now those of %s", found.where)
        _rebuild(model, config)
    set_arrays(model, adapted)


def _rebuild(model: Model, config: ModelConfig) -> None:
    """Replaces a model's modules by those that `config` builds, in the same mode."""
    other = config.build(nnx.Rngs(0))
    if not model.deterministic:
        other.train()
    vars(model).update(vars(other))


def _log_which(where: object, is_average: bool, has_average: bool) -> None:
    if is_average:
        text = "its moving average is taken; --weights=model takes the weights themselves"
    elif has_average:
        text = "the weights themselves are taken, not its moving average"
    else:
        text = "it has no moving average; the weights themselves are taken"
    log.warning("note: %s: %s", where, text)


def arrays_of(variables: Variables) -> dict[str, Any]:
    """Returns the arrays of variables by name, as `naming.arrays_of` does those of a model."""
    return {_name_in_model(name): leaf for name, leaf in named_leaves(variables).items()}


def with_arrays(variables: Variables, arrays: Mapping[str, Any]) -> Variables:
    """Returns variables with other arrays, by the names of `arrays_of`."""
    return map_named(lambda name, _: arrays[_name_in_model(name)], variables)


def _kinds_of_layers(model: ModelConfig) -> tuple[int, int] | None:
    """Returns the number of layers with SP-SA and the layer that the class token enters.

    None for a model that is no ViT.
    """
    return (model.spatial_layers, model.class_token_block) if isinstance(model, ViTConfig) else None


def _known(config: ModelConfig | None, where: object) -> ModelConfig:
    if config is None:
        raise InputError(f"{where} does not say what model it is of; name it with --arch")
    # How the weights were trained does not say on what devices they are used now.
    return dataclasses.replace(config, attention="auto")


def _name_in_model(name: str) -> str:
    """Returns a leaf's name inside the model: without `params/` or `stats/`."""
    return name.partition("/")[2]
