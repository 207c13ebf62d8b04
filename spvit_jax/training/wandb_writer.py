"""Weights & Biases as a further place for a run's metrics; the package wandb is optional."""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from spvit_jax import atomic, paths
from spvit_jax.errors import InputError, first_line

log = logging.getLogger("spvit_jax")

_ID = "wandb-id.txt"  # file in the workdir: the run's name there, the same after a restart


def check_installed(project: str | None) -> None:
    """Checks that wandb is there if a project is named.

    Raises:
      InputError: it is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"config.wandb is {project!r}, and the package wandb is not installed; "
            "pip install 'spvit_jax[wandb]', or leave config.wandb out"
        )


class WandbWriter:
    """Writer of scalars to one run of Weights & Biases, with the interface of clu's writers."""

    def __init__(self, workdir: epath.Path, project: str, config: Mapping[str, Any]):
        """Starts the run, or goes on with that of the workdir.

        Args:
          workdir: folder of the run, whose name it has there too.
          project: name of the project, `PROJECT` or `ENTITY/PROJECT`.
          config: resolved configuration.

        Raises:
          InputError: it cannot be started, as without a login.
        """
        import wandb

        path = workdir / _ID
        if not path.exists():
            atomic.write_text(path, uuid.uuid4().hex[:8])
        entity, _, name = project.rpartition("/")
        try:
            self._run = wandb.init(
                project=name,
                entity=entity or None,
                id=path.read_text().strip(),
                # Its own files are local; on a machine that trains into a bucket, where it is.
                dir=None if paths.is_remote(workdir) else str(workdir),
                name=workdir.name,
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except (wandb.Error, OSError) as error:
            raise InputError(
                f"config.wandb is {project!r}, and Weights & Biases does not start: "
                f"{first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # A run that goes on from a checkpoint reports some steps again: they may not be in order.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        where = f"offline, in {self._run.dir}" if self._run.offline else self._run.url
        log.info("wandb           %s", where)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Reports the values at a step."""
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Does nothing: wandb sends by itself."""

    def close(self) -> None:
        """Ends the run there, which the same workdir may go on with."""
        self._run.finish()
