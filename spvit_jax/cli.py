"""What all commands share: reading flags, and saying what is wrong in one line."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spvit_jax import config as config_lib
from spvit_jax import distributed
from spvit_jax.errors import InputError, nearest

T = TypeVar("T")
Getter = Callable[[], T]  # of a flag's value, once flags are parsed

STOPPED_EARLY = os.EX_TEMPFAIL  # 75: all is saved; start the same command again


def run(main: Callable[[], object]) -> None:
    """Parses the flags and runs a command; an `InputError` is one line and exit code 2."""

    def guarded(argv: list[str]) -> None:
        try:
            if argv[1:]:
                raise InputError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            main()
        except InputError as error:
            fail(error)
        except FloatingPointError as error:
            fail(error, code=1)

    # Orbax warns of its own defaults at every turn; what goes wrong it raises.
    logging.set_verbosity(logging.ERROR)
    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        _check_config_flags(argv)
        return flags.FLAGS(argv)
    except (flags.Error, InputError) as error:
        # ml_collections wraps what a config raised in a traceback; its last line is the message.
        fail(str(error).strip().rpartition("InputError: ")[2])


def _check_config_flags(argv: list[str]) -> None:
    """Raises an `InputError` for a config file or key that does not exist."""
    known = config_lib.flatten(config_lib.base().to_dict())
    for arg in argv[1:]:
        name, separator, value = arg.lstrip("-").partition("=")
        if name == "config" and separator:
            path = pathlib.Path(value.partition(":")[0])
            if not path.is_file():
                raise InputError(f"there is no config file {path}; see configs/")
        elif name.startswith("config.") and name.removeprefix("config.") not in known:
            key = name.removeprefix("config.")
            raise InputError(f"unknown config key {key!r}{nearest(key, known)}")


def fail(error: object, code: int = 2) -> NoReturn:
    """Prints an error in one line and ends the program."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def config_flag(*, required: bool = True) -> Getter[ConfigDict]:
    """Defines --config and returns a function that gives its value after parsing."""
    holder = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:ARGUMENTS")
    if required:
        flags.mark_flag_as_required("config")
    return lambda: holder.value


def cluster_flags() -> Getter[distributed.Address | None]:
    """Defines the flags of several processes; the function gives where this one belongs, if so."""
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where several processes train as one."
    )
    num_processes = flags.DEFINE_integer("num_processes", None, "How many there are of them.")
    process_id = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    on_pod = flags.DEFINE_bool(
        "distributed", None, "On a pod: find the other processes. By default where GKE names them."
    )
    timeout = flags.DEFINE_float("cluster_timeout", 300, "Seconds to wait until all have come.")

    def address() -> distributed.Address | None:
        told = coordinator.value, num_processes.value, process_id.value
        if told == (None, None, None):
            wanted = distributed.is_pod() if on_pod.value is None else on_pod.value
            return distributed.Address(timeout=timeout.value) if wanted else None
        if on_pod.value:
            raise InputError("--distributed finds the processes by itself; leave --coordinator out")
        return distributed.Address(*told, timeout=timeout.value)

    return address
