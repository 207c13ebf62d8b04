"""Converts weights: from PyTorch to a checkpoint of this project, and back.

    python -m spvit_jax.convert --arch=spvit_s --input=spvit_s.pth.tar --output=weights/spvit_s
    python -m spvit_jax.convert --arch=spvit_s --input=spvit_s.pth.tar --output=weights/384 \
        --image_size=384
    python -m spvit_jax.convert --reverse --input=runs/spvit_s --output=spvit_s.safetensors
    python -m spvit_jax.convert --reverse --hub_format --input=runs/deit_s --output=hub/deit_s

What comes out of the first two is taken by the other commands as `--checkpoint` and by training
as `config.init_from`. A model that is not in the registry is described by `--config` in the place
of `--arch`; a checkpoint of this project knows what it is and needs neither.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, cli, paths
from spvit_jax import config as config_lib
from spvit_jax import weights as weights_lib
from spvit_jax.classes import ClassNames
from spvit_jax.errors import InputError, first_line
from spvit_jax.interop import DIALECTS, Dialect, files, timm_folder, to_theirs
from spvit_jax.models import ModelConfig, ViTConfig, model_config, read_image_size
from spvit_jax.models.complexity import count_parameters
from spvit_jax.models.resize import check_adaptable
from spvit_jax.training import checkpoint, sharding
from spvit_jax.training.state import Variables

Writer = Callable[[epath.Path, Variables, ModelConfig, ClassNames | None], None]


def convert(
    source: epath.Path,
    output: epath.Path,
    like: ModelConfig | None,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    which: str = "best",
    weights: str = "auto",
    write: Writer,
) -> ModelConfig:
    """Reads weights, adapts them to another resolution or class count, and writes them.

    Args:
      source: file or folder of the weights, as in `weights.find`.
      output: file or folder to write, which must not exist yet.
      like: the model, up to resolution, classes and layer kinds; None where the weights say it.
      image_size: pixels, one number or (height, width); None keeps that of the weights.
      num_classes: with another number than the weights', the head is new; None keeps it.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      write: writes the output: `write_checkpoint`, or `write_torch` in a dialect.

    Returns:
      The configuration of the model that was written.

    Raises:
      InputError: the weights cannot be read or are of another model, or the output exists or
        cannot be written; nothing is left behind.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose another --output or remove it")
    found = weights_lib.find(source, like, which=which, weights=weights)
    if like is not None:
        check_adaptable(found.config, found.adopt_layer_kinds(like), found.where)
    model = found.config
    if image_size is not None:
        model = dataclasses.replace(model, image_size=image_size)
    if num_classes is not None:
        model = dataclasses.replace(model, num_classes=num_classes)
    found.check(model, new_head=num_classes is not None)
    class_names = found.class_names if model.num_classes == found.config.num_classes else None
    variables = found.load(model, sharding.make_mesh(-1, 1))
    lines = _changes(found, model)
    del found  # and with it the arrays that were read, so that memory holds the weights once
    write(output, variables, model, class_names)
    print(*lines, f"wrote     {output}: {_describe(model)}", sep="\n")
    return model


def write_checkpoint(
    output: epath.Path,
    variables: Variables,
    model: ModelConfig,
    class_names: ClassNames | None = None,
) -> None:
    """Writes a workdir with one checkpoint, completely or not at all.

    Raises:
      InputError: the workdir cannot be written.
    """
    try:
        with atomic.making_folder(output) as temporary:
            checkpoint.save_variables(temporary, variables, model, class_names)
    except Exception as error:  # whatever a full disk makes orbax raise
        raise InputError(f"cannot write {output}: {first_line(error)}") from error


def write_torch(
    output: epath.Path,
    variables: Variables,
    model: ModelConfig,
    class_names: ClassNames | None = None,
    *,
    dialect: Dialect,
) -> None:
    """Writes weights as a `.pth` or `.safetensors` file, with PyTorch's names, by `files.write`."""
    del class_names  # such files do not hold them
    arrays = {name: np.asarray(leaf) for name, leaf in weights_lib.arrays_of(variables).items()}
    files.write(output, to_theirs(arrays, model, dialect), model.to_dict())


def write_timm_folder(
    output: epath.Path,
    variables: Variables,
    model: ModelConfig,
    class_names: ClassNames | None = None,
    *,
    config: ConfigDict,
) -> None:
    """Writes a folder that timm loads from a disk or the hub, by `timm_folder.write`.

    `config` says how images are normalised.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in weights_lib.arrays_of(variables).items()}
    timm_folder.write(
        output,
        functools.partial(to_theirs, arrays, model, "timm"),
        model,
        mean=config.data.mean,
        std=config.data.std,
        class_names=class_names,
    )


def _changes(found: weights_lib.Weights, model: ModelConfig) -> list[str]:
    """Returns the lines that report which weights were read and how they were adapted."""
    old, height, width = found.config, *model.image_shape
    kind = "moving average, " if found.is_average else ""
    lines = [f"read      {found.where}: {kind}{_describe(old)}"]
    if old.grid != model.grid:
        grids = "{}×{} to {}×{}".format(*old.grid, *model.grid)
        lines.append(f"resized   from a grid of {grids} patches, for {height}×{width} pixels")
    if old.num_classes != model.num_classes:
        lines.append(
            f"new head  of {model.num_classes} classes; that of {old.num_classes} is left out"
        )
    return lines


def _describe(model: ModelConfig) -> str:
    text = (
        f"{type(model).__name__.removesuffix('Config')} of {count_parameters(model):,} parameters, "
        f"{model.num_classes} classes, {'×'.join(map(str, model.image_shape))} pixels"
    )
    if isinstance(model, ViTConfig) and model.class_token_block:
        first = model.class_token_block
        text += f", SP-SA in {model.spatial_layers} layers, class token from layer {first} on"
    return text


def main() -> None:
    """Runs `python -m spvit_jax.convert`."""
    arch = flags.DEFINE_string(
        "arch", None, "Name of the model; `spvit-jax list models` prints them."
    )
    config = cli.config_flag(required=False)
    source = flags.DEFINE_string(
        "input", None, "Workdir, a checkpoint, a file of PyTorch, or hf:OWNER/REPO.", required=True
    )
    output = flags.DEFINE_string(
        "output",
        None,
        "Folder to write; with --reverse, but without --hub_format, the .pth or .safetensors.",
        required=True,
    )
    reverse = flags.DEFINE_bool("reverse", False, "Write a file of PyTorch.")
    hub_format = flags.DEFINE_bool(
        "hub_format", False, "With --reverse: write a folder that timm loads, with a model card."
    )
    names = flags.DEFINE_enum(
        "names", "authors", DIALECTS, "With --reverse: whose names arrays have."
    )
    size = flags.DEFINE_string("image_size", None, "Pixels, 384 or HEIGHTxWIDTH; default as it is.")
    classes = flags.DEFINE_integer("num_classes", None, "Number of classes of a new head.")
    weights = cli.weights_flags()

    def run() -> None:
        image_size = read_image_size(size.value) if size.value else None
        target = paths.parse_output(output.value)
        write: Writer = write_checkpoint
        if hub_format.value and not reverse.value:
            raise InputError("--hub_format writes PyTorch's weights; give --reverse too")
        if hub_format.value:
            recorded = config_lib.find_recorded(paths.parse(source.value))
            trained = config_lib.base() if recorded is None else config_lib.from_json(recorded)
            write = functools.partial(write_timm_folder, config=trained)
        elif reverse.value:
            files.check_name(target)
            write = functools.partial(write_torch, dialect=cast(Dialect, names.value))
        convert(
            paths.parse(source.value),
            target,
            _model(arch.value, config(), image_size),
            image_size=image_size,
            num_classes=classes.value,
            write=write,
            **weights(),
        )

    cli.run(run)


def _model(
    arch: str | None, config: ConfigDict | None, image_size: int | tuple[int, int] | None
) -> ModelConfig | None:
    """Returns the model that --arch or --config names, or None without either."""
    if arch and config:
        raise InputError("--arch and --config both name a model; give one of them")
    if config:
        return config_lib.model_settings(config, num_classes=1000)
    return model_config(arch, image_size=image_size) if arch else None


if __name__ == "__main__":
    main()
