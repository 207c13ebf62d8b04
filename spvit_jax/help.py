"""Help texts of commands: how to call one, what it does, its own flags first, with an example."""

from __future__ import annotations

import re
import sys
import textwrap
from types import ModuleType

from absl import flags

_WIDTH = 96
_MORE = (
    "Every field of the configuration is a flag too, --config.optim.lr=1e-3; "
    "`spvit-jax list fields` prints them, `spvit-jax list configs` the recipes."
)


def is_asked_for(argv: list[str]) -> bool:
    """Returns whether arguments ask for help."""
    return any(arg.lstrip("-") in ("help", "h") for arg in argv[1:] if arg.startswith("-"))


def program(argv: list[str], module: ModuleType) -> str:
    """Returns the words that start a command: `spvit-jax train` or `python -m spvit_jax.train`."""
    spec = getattr(module, "__spec__", None)
    if module is sys.modules["__main__"] and spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return argv[0]


def text(argv: list[str], module: ModuleType, operands: str = "") -> str:
    """Returns the help text of a command whose flags have been defined.

    Args:
      argv: arguments of the process, of which the first names the command.
      module: module of the command, whose docstring has an example.
      operands: what stands for the arguments that are no flags, such as "IMAGE…".
    """
    own = _flags_of(module.__name__)
    shared = _flags_of("spvit_jax.cli")
    config = [flag for flag in shared if flag.name == "config"]
    rest = [flag for flag in shared if flag.name != "config"]
    usage = " ".join([program(argv, module), *([operands] if operands else []), "[--FLAG=VALUE …]"])
    described = "\n".join(_describe(flag) for flag in [*config, *own, *rest])
    parts = [f"usage: {usage}", (module.__doc__ or "").strip(), f"flags:\n{described}"]
    if config:
        parts.append(textwrap.fill(_MORE, _WIDTH))
    return "\n\n".join(parts) + "\n"


def missing_flags(error: Exception) -> str | None:
    """Returns the line for required flags that were not given; None for another error."""
    names = re.findall(r"Flag --(\w+) must have a value other than None", str(error))
    if not names:
        return None
    given = " and ".join(f"--{name}" for name in dict.fromkeys(names))
    return f"{given} must be given; --help shows an example"


def _flags_of(module: str) -> list[flags.Flag]:
    """Returns the flags that a module has defined, in that order."""
    return list(flags.FLAGS.flags_by_module_dict().get(module, []))


def _describe(flag: flags.Flag) -> str:
    """Returns a flag with its help, wrapped in two columns."""
    is_bool = flag.flag_type() == "bool"
    name = f"  --[no]{flag.name}" if is_bool else f"  --{flag.name}"
    meaning = flag.help or ""
    if flag.default not in (None, False, [], ""):
        meaning += f" Default: {flag.default}."
    lines = textwrap.wrap(meaning, _WIDTH - 26) or [""]
    first = f"{name:<24}  {lines[0]}" if len(name) <= 24 else f"{name}\n{'':26}{lines[0]}"
    return "\n".join([first, *(f"{'':26}{line}" for line in lines[1:])])
