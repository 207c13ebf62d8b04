"""Files of `torch.save`, read without executing anything in them.

They are pickles, which are programs; PyTorch reads those with an allow-list. PyTorch is imported
only here and where such a file is written, and only then.
"""

from __future__ import annotations

import pathlib
import re
import warnings
from collections import OrderedDict
from types import ModuleType
from typing import Any

from spvit_jax.errors import InputError, shown
from spvit_jax.interop.containers import CONTAINERS

# How torch names what it refuses to run.
_REFUSED = re.compile(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", re.IGNORECASE)


class _Setting:
    """Stands for an object of a command line: takes what it is made from, and drops it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What the settings of a run that were saved beside its weights are made of: the pickle's name and
# what stands for it here. None of the classes themselves is imported or called.
_SETTINGS: tuple[tuple[type, str], ...] = (
    (_Setting, "argparse.Namespace"),
    (OrderedDict, "yacs.config.CfgNode"),  # in Swin's checkpoints; torch fills no other mapping
    *((_Setting, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *(
        (_Setting, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(
        (_Setting, f"{module}.{prefix}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for prefix in ("", "Pure")
        for system in ("", "Posix", "Windows")
    ),
)


def read(path: pathlib.Path) -> Any:
    """Reads what `torch.save` wrote; settings of a run come as empty objects.

    Raises:
      InputError: PyTorch is not installed, or the file is damaged, no such file, or asks for
        something to be run.
    """
    torch = import_torch()
    try:
        with (
            path.open("rb") as file,  # by its name torch would take it for what its suffix says
            warnings.catch_warnings(),
            torch.serialization.safe_globals(list(_SETTINGS)),
        ):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        if match := _REFUSED.search(str(error)):
            raise InputError(
                f"{path} is refused: it asks for {shown(match[1])} to be run, and weights have no "
                "need of that. If you trust where it is from, save its tensors alone (of a whole "
                f"module its state_dict()): {_saving(path)}"
            ) from error
        raise InputError(
            f"{path} is damaged or not a file of PyTorch weights; nothing in it was run"
        ) from error


def import_torch() -> ModuleType:
    """Returns PyTorch, or raises an `InputError` that says how to install it."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "files of PyTorch are read and written with PyTorch, which is not installed: "
            "pip install torch==2.13.0, or use a .safetensors file"
        ) from error
    return torch


def _saving(path: pathlib.Path) -> str:
    """Returns the line of Python that saves the tensors of a file which is refused."""
    return (
        f"import torch; content = torch.load({str(path)!r}, weights_only=False); "
        f"torch.save({{key: content[key] for key in content if key in {tuple(CONTAINERS)} "
        f"or torch.is_tensor(content[key])}}, {str(path.with_name('tensors.pth'))!r})"
    )
