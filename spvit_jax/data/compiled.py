"""Compilation of functions on pixels by Numba, to code that runs while other threads hold the GIL.

Numba keeps compiled code beside the source or, where that folder cannot be written, in the user's
cache (`NUMBA_CACHE_DIR` names another one). It finds its code out of date by the function's own
file alone: compiled functions call no compiled functions of other files.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compiles a function on NumPy arrays at its first call, and keeps the code if it can."""
    compiler: Any = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        dispatcher = compiler(function, cache=True)
    except RuntimeError:  # no folder can be written
        return compiler(function)
    dispatcher._cache.save_overload = _if_it_can(dispatcher._cache.save_overload)
    return dispatcher


def _if_it_can(save: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that keeps compiled code, and does not fail on a full disk."""

    def save_if_it_can(*args: Any) -> None:
        with contextlib.suppress(OSError):
            save(*args)

    return save_if_it_can
