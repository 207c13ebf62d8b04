"""Compilation of functions on pixels by Numba, to code that runs while other threads hold the GIL.

Numba keeps compiled code beside the source or, where that folder cannot be written, in the user's
cache (`NUMBA_CACHE_DIR` names another one). It finds its code out of date by the function's own
file alone: compiled functions call no compiled functions of other files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compiles a function on NumPy arrays at its first call, and keeps the code if it can."""
    compiler: Any = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        return compiler(function, cache=True)
    except RuntimeError:  # no folder can be written
        return compiler(function)
