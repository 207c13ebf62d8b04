"""Places where a run's metrics are written beside its own records: TensorBoard, W&B, one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from etils import epath
from ml_collections import ConfigDict

from spvit_jax.errors import InputError, nearest, writing
from spvit_jax.training import wandb_writer
from spvit_jax.training.tensorboard import EventFile
from spvit_jax.training.wandb_writer import WandbWriter


class MetricWriter(Protocol):
    """Place for a run's metrics; writers of clu are such ones."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], /) -> None:
        """Writes the values of a step."""

    def flush(self) -> None:
        """Puts what has been written where it survives this machine."""

    def close(self) -> None:
        """Ends writing."""


# (workdir, resolved configuration) → the writer.
OpenWriter = Callable[[epath.Path, Mapping[str, Any]], MetricWriter]

_REGISTERED: dict[str, OpenWriter] = {}


def register_writer(name: str, open_writer: OpenWriter) -> None:
    """Adds a writer of metrics, which `config.writers` then names.

    Args:
      name: name of the writer, without a comma.
      open_writer: returns the writer for a workdir and the resolved configuration, as nested
        dictionaries. It is called once in each start of a run, in the first process alone; a run
        that goes on from a checkpoint may write the metrics of some steps again.
    """
    _REGISTERED[name] = open_writer


def check(config: ConfigDict) -> None:
    """Checks that the writers of a configuration exist.

    Raises:
      InputError: `config.writers` names an unknown one, or wandb is not installed.
    """
    wandb_writer.check_installed(config.wandb)
    for name in _names(config):
        if name not in _REGISTERED:
            known = nearest(name, _REGISTERED) if _REGISTERED else ""
            raise InputError(
                f"unknown writer {name!r} in config.writers{known}; --import=MODULE names the "
                "module that registers it"
            )


def open_all(workdir: epath.Path, config: ConfigDict) -> Iterator[MetricWriter]:
    """Yields the writers of a run, opened: TensorBoard's, and those that its configuration names.

    Raises:
      InputError: Weights & Biases does not start.
      WriteError: the workdir cannot be written.
    """
    with writing(workdir):
        yield EventFile(workdir)
    if config.wandb:
        yield WandbWriter(workdir, config.wandb, config.to_dict())
    for name in _names(config):
        yield _REGISTERED[name](workdir, config.to_dict())


def _names(config: ConfigDict) -> list[str]:
    return [name.strip() for name in (config.writers or "").split(",") if name.strip()]
