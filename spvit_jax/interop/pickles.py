"""Reader of `torch.save` files that executes nothing in them.

The files are pickles, which are programs; PyTorch reads them with an allow-list of classes. PyTorch
is imported only when such a file is read or written.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from types import ModuleType
from typing import Any

from etils import epath

from spvit_jax import paths
from spvit_jax.errors import InputError, shown
from spvit_jax.interop.containers import CONTAINERS

# torch's message about a class or function that is not on the allow-list.
_REFUSED = re.compile(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", re.IGNORECASE)


class _Setting:
    """Empty placeholder for an object of a run's settings; ignores its arguments and state."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Classes of the settings that training scripts save beside the weights: the class that is made
# instead, and the name in the pickle. The named classes are neither imported nor called.
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


def read(path: epath.Path) -> Any:
    """Reads a file that `torch.save` wrote; objects of a run's settings come back empty.

    Raises:
      InputError: PyTorch is not installed, or the file is missing, damaged, or asks for a class
        or function that is not on the allow-list.
    """
    torch = import_torch()
    try:
        with (
            paths.local_copy(path) as local,
            local.open("rb") as file,  # given a path, torch would go by its suffix
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
            "pip install 'spvit_jax[torch]', or use a .safetensors file"
        ) from error
    return torch


def _saving(path: epath.Path) -> str:
    """Returns a line of Python that saves the tensors of a refused file, for an error message."""
    return (
        f"import torch; content = torch.load({str(path)!r}, weights_only=False); "
        f"torch.save({{key: content[key] for key in content if key in {tuple(CONTAINERS)} "
        f"or torch.is_tensor(content[key])}}, {str(path.with_name('tensors.pth'))!r})"
    )
