"""The configuration of a run that was, from its workdir: to evaluate it, or to run it once more.

    python -m spvit_jax.evaluate --config=workdir:runs/digits --checkpoint=runs/digits
    python -m spvit_jax.train --config=workdir:runs/digits --workdir=runs/again --config.seed=1

The argument is a workdir, or a checkpoint in one. A command that is given such a --checkpoint and
no --config takes this one.
"""

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import paths
from spvit_jax.errors import InputError


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `arg`, a workdir or a checkpoint in one."""
    file = None if not arg else config_lib.find_recorded(paths.parse(arg))
    if file is None:
        raise InputError(f"{arg!r} is no workdir of training, nor in one: it has no config.json")
    try:
        return config_lib.from_json(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
