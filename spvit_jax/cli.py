"""Flags that all commands share, and errors of the user printed as one line."""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spvit_jax import config as config_lib
from spvit_jax import distributed, logs
from spvit_jax.errors import WRONG_INPUT, InputError, WriteError, exit_code, nearest

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

T = TypeVar("T")
Getter = Callable[[], T]  # returns a flag's value, once flags are parsed


def run(main: Callable[[], object]) -> None:
    """Parses the flags and runs a command; an error that is no bug is printed as one line."""

    def guarded(argv: list[str]) -> None:
        try:
            if argv[1:]:
                raise InputError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            main()
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            if isinstance(error, WriteError):
                # Coroutines that orbax leaves behind would print tracebacks at exit.
                sys.unraisablehook = lambda _: None
            fail(error, code)

    # Orbax warns of its own defaults at every call, and logs the tracebacks of what it raises.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _print_unraisable
    logs.start()
    app.run(guarded, flags_parser=_parse)


def _print_unraisable(unraisable: UnraisableHookArgs) -> None:
    """Prints an exception that Python cannot raise; the `sys.unraisablehook` of all commands.

    When one of orbax's writes fails, tensorstore's threads report each of the others to an event
    loop that is closed by then. The failure itself is raised.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, for `app.run`; returns the arguments that are no flags."""
    path = _config_file(argv)
    try:
        _check_config_flags(argv, path)
        rest = flags.FLAGS(argv)
        if path is not None:
            _check_fields(flags.FLAGS.config, path)
        return rest
    except Exception as error:
        line = _as_line(error, path)
        if line is None:
            raise
        fail(line)


def _as_line(error: Exception, path: pathlib.Path | None) -> str | None:
    """Returns the line that describes an error in reading the flags; None if it is a bug.

    Exceptions of a config file arrive wrapped; the line names their place in that file.
    """
    cause: BaseException | None = error
    while cause is not None and path is not None:
        if isinstance(cause, SyntaxError) and cause.filename == str(path):
            return f"{path}:{cause.lineno}: {type(cause).__name__}: {cause.msg}"
        frames = traceback.extract_tb(cause.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if lines:
            message = " ".join(str(cause).split())
            known = isinstance(cause, InputError)
            return message if known else f"{path}:{lines[-1]}: {type(cause).__name__}: {message}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, InputError | flags.Error):
        return str(error)
    return None if path is None else f"{path}: {type(error).__name__}: {error}"


def _config_file(argv: list[str]) -> pathlib.Path | None:
    """Returns the file that --config names, without the argument behind its colon, or None."""
    for arg, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        if arg.startswith("-"):
            name, separator, value = arg.lstrip("-").partition("=")
            if name == "config":
                return pathlib.Path((value if separator else following).partition(":")[0])
    return None


def _check_config_flags(argv: list[str], path: pathlib.Path | None) -> None:
    """Raises an `InputError` for a config file or key that does not exist."""
    if path is not None and not path.is_file():
        raise InputError(f"there is no config file {path}; see configs/")
    known = config_lib.flatten(config_lib.base().to_dict())
    for arg in argv[1:]:
        name = arg.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            key = name.removeprefix("config.")
            raise InputError(f"unknown config key {key!r}{nearest(key, known)}")


def _check_fields(config: Any, path: pathlib.Path) -> None:
    """Raises an `InputError` if a config file's result lacks fields of a configuration."""
    given = config_lib.flatten(getattr(config, "to_dict", dict)())
    missing = sorted(config_lib.flatten(config_lib.base().to_dict()).keys() - given.keys())
    if missing:
        raise InputError(
            f"{path}: its get_config() does not give a configuration: without {missing[0]!r}"
            + (f" and {len(missing) - 1} fields more" if len(missing) > 1 else "")
            + "; begin with spvit_jax.config.base(), and return it"
        )


def fail(error: object, code: int = WRONG_INPUT) -> NoReturn:
    """Prints an error as one line and exits the program with a code."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def config_flag(*, required: bool = True) -> Getter[ConfigDict]:
    """Defines --config; returns a function for its value, to be called after parsing."""
    holder = config_flags.DEFINE_config_file("config", help_string="FILE.py or FILE.py:ARGUMENTS")
    if required:
        flags.mark_flag_as_required("config")
    return lambda: holder.value


def weights_flags() -> Getter[dict[str, str]]:
    """Defines --step and --weights; returns a function for both, as arguments of `weights.find`."""
    which = flags.DEFINE_string("step", "best", "Of a workdir: best, last, or a number.")
    weights = flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "model", "ema"],
        "The weights themselves (model) or their moving average (ema); auto is the average where "
        "there is one, in a checkpoint and in a file of PyTorch.",
    )
    return lambda: {"which": which.value, "weights": weights.value}


def cluster_flags() -> Getter[distributed.Address | None]:
    """Defines the flags of multi-process runs; returns a function for this process's address.

    The address is None in a run of a single process.
    """
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where several processes train as one."
    )
    num_processes = flags.DEFINE_integer("num_processes", None, "Number of processes.")
    process_id = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    on_pod = flags.DEFINE_bool(
        "distributed", None, "On a pod: find the other processes. By default where GKE names them."
    )
    timeout = flags.DEFINE_float("cluster_timeout", 300, "Seconds to wait for all processes.")

    def address() -> distributed.Address | None:
        told = coordinator.value, num_processes.value, process_id.value
        if told == (None, None, None):
            wanted = distributed.is_pod() if on_pod.value is None else on_pod.value
            return distributed.Address(timeout=timeout.value) if wanted else None
        if on_pod.value:
            raise InputError("--distributed finds the processes by itself; leave --coordinator out")
        return distributed.Address(*told, timeout=timeout.value)

    return address
