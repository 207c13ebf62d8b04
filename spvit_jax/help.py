"""Help texts of commands: how to call one, what it does, its own flags first, with an example."""

from __future__ import annotations

import re
import sys
import textwrap
from types import ModuleType

from absl import flags

_WIDTH = 96
_REQUIRED = re.compile(r"Flag --(\w+) must have a value other than None")  # absl's words
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
    command = program(argv, module)
    # absl knows the module that was started by the name of its file.
    own = _flags_of(argv[0] if module.__name__ == "__main__" else module.__name__)
    shared = _flags_of("spvit_jax.cli")
    config = [flag for flag in shared if flag.name == "config"]
    rest = [flag for flag in shared if flag.name != "config"]
    described = [_describe(flag) for flag in [*config, *own, *rest]]
    words = [command, operands, "[--FLAG=VALUE …]" if described else ""]
    parts = [f"usage: {' '.join(filter(None, words))}", description(command, module)]
    if described:
        parts.append("\n".join(["flags:", *described]))
    if config:
        parts.append(textwrap.fill(_MORE, _WIDTH))
    return "\n\n".join(parts) + "\n"


def description(command: str, module: ModuleType) -> str:
    """Returns a module's docstring with its examples as the user calls the command.

    Args:
      command: words that start it, as `program` returns them.
      module: module of the command.
    """
    doc = (module.__doc__ or "").strip()
    # Of a line that is continued, Python has joined the parts.
    doc = re.sub(r"(?<=\S) {8,}(?=\S)", " \\\n        ", doc)
    if command.startswith("python "):
        return doc
    spec = getattr(module, "__spec__", None)
    name = module.__name__ if spec is None else spec.name
    doc = doc.replace(f"python -m {name.removesuffix('.__main__')}", command)
    return re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", doc)


def missing_flags(error: Exception) -> str | None:
    """Returns the line for required flags that were not given; None for another error."""
    names = _REQUIRED.findall(str(error))
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
    # absl adds a line to the help of flags that take several values.
    meaning, several, _ = (flag.help or "").partition(";\n    repeat this option")
    if several:
        meaning += " May be given several times."
    if any(_REQUIRED.match(validator.message) for validator in flag.validators):
        is_known = flag.name == "config" and "checkpoint" in flags.FLAGS
        meaning += f" Required{', unless the checkpoint is of a run' if is_known else ''}."
    if flag.default not in (None, [], "") and flag.default is not False:
        default = flag.default
        meaning += f" Default: {', '.join(default) if isinstance(default, list) else default}."
    lines = textwrap.wrap(meaning, _WIDTH - 26) or [""]
    first = f"{name:<24}  {lines[0]}" if len(name) <= 24 else f"{name}\n{'':26}{lines[0]}"
    return "\n".join([first, *(f"{'':26}{line}" for line in lines[1:])])
