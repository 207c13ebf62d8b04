"""Lists what there is: models, configs, fields, augmentations or topologies.

    spvit-jax list models "spvit*"
    spvit-jax list configs
    spvit-jax list fields "optim.*"
    spvit-jax list topologies v5e

A pattern is a shell's, and matches names.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator

from spvit_jax import cli, recipes
from spvit_jax import config as config_lib
from spvit_jax.errors import InputError, nearest
from spvit_jax.models import FAMILIES, aliases, list_models, model_config
from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.preflight.topology import CHIPS, GIB

# A field of a configuration with its comment, behind it or, where that is long, on the line above.
_FIELD = re.compile(
    r"^ +(?:# (?P<above>.+)\n +)?(?:config\.)?(?P<name>\w+(?:\.\w+)*)(?:: [^=\n]+)? = "
    r"(?:.*?  # (?P<behind>.+)|[^#\n]+)$",
    re.MULTILINE,
)


def models(pattern: str = "*") -> Iterator[str]:
    """Yields a line for each model: name, parameters, multiply-adds at 224 pixels, timm's name."""
    for name in list_models(pattern):
        config = model_config(name)
        macs = count_macs(config) / 1e9
        theirs = aliases.timm_name(name, config.image_shape)
        yield (
            f"{name:<20} {count_parameters(config) / 1e6:7.2f} M parameters {macs:7.2f} GMACs"
            + (f"   {theirs}" if theirs else "")
        )


def configs(pattern: str = "*") -> Iterator[str]:
    """Yields a line for each recipe that comes with the package: its name and what it trains."""
    for name, path in recipes.shipped().items():
        if fnmatch.fnmatch(name, pattern):
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            yield f"{name:<12} {doc.partition(chr(10))[0]}"


def fields(pattern: str = "*") -> Iterator[str]:
    """Yields a line for each field of a configuration: its name, default and meaning."""
    meanings = field_meanings()
    for name, value in config_lib.flatten(config_lib.base().to_dict()).items():
        if fnmatch.fnmatch(name, pattern):
            yield f"{f'{name} = {value!r}':<44} {meanings[name]}"


def augmentations(pattern: str = "*") -> Iterator[str]:
    """Yields a line for each field of `augment`, by its name without that word."""
    for line in fields(f"augment.{pattern}"):
        yield line.removeprefix("augment.")


def topologies(pattern: str = "*") -> Iterator[str]:
    """Yields a line for each kind of TPU chip: its memory, peak, and the shapes of its slices."""
    for name, chip in CHIPS.items():
        if fnmatch.fnmatch(name, pattern):
            size, peak = f"{chip.hbm / GIB:g} GiB", f"{chip.flops / 1e12:g} TFLOP/s"
            yield f"{name:<6} {size:>8} {peak:>14}   {', '.join(chip.shapes)}"


def field_meanings() -> dict[str, str]:
    """Returns the comment of each field of a configuration, by the field's name."""
    meanings: dict[str, str] = {}
    every = (base for family in FAMILIES for base in reversed(family.__mro__))
    classes = dict.fromkeys(base for base in every if dataclasses.is_dataclass(base))
    families = "".join(inspect.getsource(family) for family in classes)
    for prefix, source in (("", inspect.getsource(config_lib.base)), ("model.", families)):
        for field in _FIELD.finditer(source):
            meaning = field["behind"] or field["above"]
            if meaning:
                meanings.setdefault(prefix + field["name"], meaning)
    return meanings


KINDS: dict[str, Callable[[str], Iterator[str]]] = {
    "models": models,
    "configs": configs,
    "fields": fields,
    "augmentations": augmentations,
    "topologies": topologies,
}


def main() -> None:
    """Runs the command."""

    def run(kind: str = "", pattern: str = "*", *more: str) -> None:
        if kind not in KINDS:
            raise InputError(f"expected what to list, got {kind!r}{nearest(kind, KINDS)}")
        if more:
            raise InputError(f"expected one pattern, got {[pattern, *more]}; quote it in a shell")
        empty = True
        for line in KINDS[kind](pattern):
            print(line, flush=True)
            empty = False
        if empty:
            raise InputError(f"no {kind} match {pattern!r}; without a pattern all are listed")

    cli.run(run, operands="{" + ",".join(KINDS) + "} [PATTERN]")


if __name__ == "__main__":
    main()
