"""Flags that all commands share, and errors of the user printed as one line."""

from __future__ import annotations

import importlib
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import spvit_jax
from spvit_jax import config as config_lib
from spvit_jax import distributed, help, logs, paths, recipes
from spvit_jax.errors import WRONG_INPUT, InputError, WriteError, exit_code, nearest
from spvit_jax.interop import hub

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import ModuleType

T = TypeVar("T")
Getter = Callable[[], T]  # returns a flag's value, once flags are parsed

_CONFIG_HELP = (
    "Recipe with its arguments, such as spvit:s,384, by the name of one that comes with the "
    "package or as a file, configs/spvit.py:s,384."
)

# Of the flag --checkpoint, where it takes all that `weights.find` does.
CHECKPOINT_HELP = "Workdir, a checkpoint in it, a file of PyTorch, or hf:OWNER/REPO."


def run(main: Callable[..., object], *, operands: str = "") -> None:
    """Parses the flags and runs a command; an error that is no bug is printed as one line.

    Args:
      main: the command. Its module's docstring is the help text.
      operands: what stands in the help text for arguments that are no flags, such as "IMAGE…",
        which `main` is called with; by default there are none.
    """

    def guarded(argv: list[str]) -> None:
        try:
            if argv[1:] and not operands:
                raise InputError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            main(*argv[1:])
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            if isinstance(error, WriteError):
                # Coroutines that orbax leaves behind would print tracebacks and warnings at exit.
                sys.unraisablehook = lambda _: None
                warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            fail(error, code)
        finally:
            logs.flush()

    # Orbax warns of its own defaults at every call, and logs the tracebacks of what it raises.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _print_unraisable
    logs.start()
    module = sys.modules[main.__module__]
    app.run(guarded, flags_parser=lambda argv: _parse(argv, module, operands))


def _print_unraisable(unraisable: UnraisableHookArgs) -> None:
    """Prints an exception that Python cannot raise; the `sys.unraisablehook` of all commands.

    When one of orbax's writes fails, tensorstore's threads report each of the others to an event
    loop that is closed by then. The failure itself is raised.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _parse(argv: list[str], module: ModuleType, operands: str = "") -> list[str]:
    """Parses the flags, for `app.run`; returns the arguments that are no flags."""
    if help.is_asked_for(argv):
        print(help.text(argv, module, operands))
        sys.exit()
    if "--version" in argv[1:]:
        print(f"spvit_jax {spvit_jax.__version__}")
        sys.exit()
    path = None
    try:
        argv = _with_recipe_files(argv)
        path = _config_file(argv)
        _import_packages(argv)
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
        return help.missing_flags(error) or str(error)
    return None if path is None else f"{path}: {type(error).__name__}: {error}"


def _config_file(argv: list[str]) -> pathlib.Path | None:
    """Returns the file that --config names, without the argument behind its colon, or None."""
    value = _value_of("config", argv)
    return None if value is None else pathlib.Path(value.partition(":")[0])


def _value_of(flag: str, argv: list[str]) -> str | None:
    """Returns what an argument `--FLAG=VALUE` says; None without one."""
    values = [arg.partition("=")[2] for arg in argv[1:] if re.match(f"--?{flag}=", arg)]
    return values[-1] if values else None


def _with_recipe_files(argv: list[str]) -> list[str]:
    """Returns the arguments with `--config NAME` as one word, and a recipe's file for its NAME.

    A file of this name comes before a recipe that comes with the package. Without --config the
    configuration of the run that --checkpoint belongs to is taken.
    """
    joined: list[str] = []
    for arg in argv:
        if joined and re.fullmatch("--?(config|import|checkpoint)", joined[-1]):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    known = recipes.shipped()
    if "config" in flags.FLAGS and _value_of("config", joined) is None:
        path = _value_of("checkpoint", joined)
        if path and not hub.is_name(path) and config_lib.find_recorded(paths.parse(path)):
            joined.append(f"--config=workdir:{path}")
    for index, arg in enumerate(joined[1:], 1):
        flag, _, value = arg.partition("=")
        name, colon, argument = value.partition(":")
        if flag.lstrip("-") == "config" and name in known and not pathlib.Path(name).is_file():
            joined[index] = f"{flag}={known[name]}{colon}{argument}"
    return joined


def _import_packages(argv: list[str]) -> None:
    """Imports what --import names, before a recipe is read that may use it.

    Raises:
      InputError: there is no such module, or it imports one that there is not.
    """
    for name in [arg.partition("=")[2] for arg in argv[1:] if re.match("--?import=", arg)]:
        if "" not in sys.path:
            sys.path.insert(0, "")  # the working directory, as for `python -m`
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"--import={name}: {error}; expected a module on the path, or in this folder"
            ) from error


def _check_config_flags(argv: list[str], path: pathlib.Path | None) -> None:
    """Raises an `InputError` for a config file or key that does not exist."""
    if path is not None and not path.is_file():
        known = recipes.shipped()
        raise InputError(
            f"there is no config file {path}, and no recipe of this name{nearest(path.stem, known)}"
        )
    fields = config_lib.flatten(config_lib.base().to_dict())
    for arg in argv[1:]:
        name = arg.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in fields:
            key = name.removeprefix("config.")
            raise InputError(f"unknown config key {key!r}{nearest(key, fields)}")


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
    holder = config_flags.DEFINE_config_file("config", help_string=_CONFIG_HELP)
    flags.DEFINE_multi_string(
        "import",
        [],
        "Module of one's own that registers models, data sets, losses or writers of metrics.",
    )
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
