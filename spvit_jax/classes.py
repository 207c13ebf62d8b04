"""Class names by number: one table for all splits of a run, kept with its weights."""

from __future__ import annotations

import json
import zlib

from etils import epath

from spvit_jax import atomic
from spvit_jax.errors import InputError, some

ClassNames = tuple[str, ...]

_FILE = "classes.json"  # in the workdir


def difference(given: ClassNames, expected: ClassNames) -> str:
    """Describes how two tables of class names differ; the text is empty if they are equal."""
    if given == expected:
        return ""
    added = sorted(set(given) - set(expected))
    missing = sorted(set(expected) - set(given))
    if not added and not missing:
        return "the same names in another order"
    return f"not expected: {some(added)}; missing: {some(missing)}"


def check_same(given: ClassNames, expected: ClassNames, what: str, advice: str) -> None:
    """Checks that two tables of class names are equal.

    Args:
      given: class names by number.
      expected: class names by number.
      what: first part of the error, for example "the teacher has other classes than the data".
      advice: last part of the error: what to do.

    Raises:
      InputError: the tables differ; shows in which names.
    """
    if different := difference(given, expected):
        raise InputError(f"{what} ({different}); {advice}")


def fingerprint(names: ClassNames) -> str:
    """Returns the number of classes with a checksum of their names, for comparing processes."""
    encoded = "\0".join(names).encode(errors="surrogateescape")
    return f"{len(names)} with the checksum {zlib.crc32(encoded):08x}"


def claim_workdir(
    workdir: epath.Path, names: ClassNames, *, in_use: bool, write: bool = True
) -> None:
    """Writes the class names of a run to its workdir, or checks that they are those of the workdir.

    The file is a JSON list of names by number.

    Args:
      workdir: folder of the run, which exists.
      names: class names of the training split.
      in_use: whether the workdir holds checkpoints, with whose classes these must then agree.
      write: whether this process writes the file; all processes compare.

    Raises:
      InputError: the workdir has other classes, or the file cannot be read or written.
    """
    path = workdir / _FILE
    try:
        if in_use and path.exists():
            check_same(
                names,
                tuple(json.loads(path.read_text())),
                f"workdir {workdir} belongs to a run with other classes than the training data",
                f"choose another --workdir, or give the data the classes in {path}",
            )
        elif write:
            atomic.write_text(path, json.dumps(names, indent=2) + "\n")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read or written: {error}") from error
