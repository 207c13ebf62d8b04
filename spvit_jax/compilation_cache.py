"""JAX's persistent compilation cache: compiled programs in a folder that outlives the process.

A run that is started again, as after a preemption, then compiles nothing that took a second. Of
several processes the first writes, so that the folder has to be one that all of them see: in a run
it is in the workdir. The keys are JAX's, of the program, the devices and the versions, so that one
folder serves any number of programs.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from spvit_jax import distributed
from spvit_jax.logs import log

OFF = "off"
_JAXS_WARNINGS = ("Error reading persistent", "Error writing persistent")


def start(folder: str | None, workdir: epath.PathLike | None = None) -> None:
    """Takes programs from a folder, and adds those that are compiled from now on.

    A folder that cannot be used is a warning, and an entry that cannot be read or written another.

    Args:
      folder: path of the folder, which is created if need be, or "off" for none; None is JAX's
        own setting, the variable JAX_COMPILATION_CACHE_DIR, and without that a folder in the
        workdir, or in ~/.cache without a workdir.
      workdir: folder of a run.
    """
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", folder != OFF)
    if folder == OFF:
        return
    jaxs_own = jax.config.values["jax_compilation_cache_dir"]
    path = epath.Path(folder or jaxs_own or _default(workdir))
    reason = _create(path)
    if reason is not None:
        log.warning("warning: programs are compiled at each start: %s: %s", path, reason)
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    _log_errors_once(path)


def _default(workdir: epath.PathLike | None) -> epath.Path:
    if workdir is not None:
        return epath.Path(workdir) / "compilation_cache"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return epath.Path(caches) / "spvit_jax" / "compilation_cache"


def _create(path: epath.Path) -> str | None:
    """Creates a folder and tries to write there; returns why neither of its uses is possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    # Each kind of storage raises errors of its own, and none of them is worth a run.
    except Exception as error:
        return str(error)
    try:
        if distributed.is_primary():
            probe = path / "writable"
            probe.write_text("")
            probe.unlink()
    except Exception as error:
        log.warning("warning: no compiled program is added to %s: %s", path, error)
    return None


def _log_errors_once(path: epath.Path) -> None:
    """Logs the first of JAX's warnings of each kind about an entry, and drops the others."""
    known: set[str] = set()
    previous = warnings.showwarning

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        kind = next((kind for kind in _JAXS_WARNINGS if str(message).startswith(kind)), None)
        if kind is None:
            previous(message, *args, **kwargs)
        elif kind not in known:
            known.add(kind)
            log.warning("warning: %s, in %s", " ".join(str(message).split()), path)

    warnings.showwarning = show
