"""Weights from the Hugging Face hub, named `hf:OWNER/REPO` or `hf:OWNER/REPO/FILE`.

Downloading, resuming and the cache are `huggingface_hub`'s, which `pip install spvit_jax[hub]`
brings; its environment variables hold (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import json
import logging
import pathlib
import re
import shutil
from types import ModuleType

from spvit_jax.errors import InputError, first_line, some
from spvit_jax.interop import files

log = logging.getLogger("spvit_jax")

_PREFIX = "hf:"
_INDEX = ".index.json"
_CONFIG = "config.json"  # which names the architecture


def is_name(source: object) -> bool:
    """Returns whether a source of weights is the name of some on the hub."""
    return str(source).startswith(_PREFIX)


def download(name: str) -> pathlib.Path:
    """Downloads weights into the hub's cache, unless they are there, and returns their path.

    Args:
      name: `hf:OWNER/REPO` for the repository's weights, as `files.read` would choose among them,
        or `hf:OWNER/REPO/FILE`; `@REVISION` behind REPO takes a branch, tag or commit.

    Raises:
      InputError: the name is no such name, there is no such repository or file, the hub cannot be
        reached, the disk is too small, or huggingface_hub is not installed.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/(.+))?", name)
    if match is None:
        raise InputError(f"{name!r} is no name on the hub; expected hf:OWNER/REPO or with /FILE")
    repository, revision, file = match.groups()
    hub = _import_hub()
    try:
        known = _files(hub, repository, revision)
        wanted = [_choose(known, file, name)]
        if wanted[0].endswith(_INDEX):
            index = pathlib.Path(hub.hf_hub_download(repository, wanted[0], revision=revision))
            folder = wanted[0].rpartition("/")[0]
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            wanted += [f"{folder}/{shard}".lstrip("/") for shard in shards]
        wanted += [_CONFIG] if _CONFIG in known else []
        _check_space(hub, repository, revision, wanted)
        paths = [hub.hf_hub_download(repository, each, revision=revision) for each in wanted]
    except InputError:
        raise
    except (hub.errors.HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot take {name} from the hub: {_reason(hub, error)}") from error
    return pathlib.Path(paths[0])


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError(
            "weights of the Hugging Face hub need huggingface_hub: pip install 'spvit_jax[hub]'"
        ) from error
    return huggingface_hub


def _files(hub: ModuleType, repository: str, revision: str | None) -> list[str]:
    """Returns the files of a repository; those in the cache where the hub cannot be reached."""
    try:
        siblings = hub.HfApi().model_info(repository, revision=revision).siblings
        return sorted(each.rfilename for each in siblings or [])
    except hub.errors.HfHubHTTPError:
        raise  # it was reached
    except (hub.errors.HTTPError, OSError) as error:
        try:
            folder = hub.snapshot_download(repository, revision=revision, local_files_only=True)
        except (hub.errors.LocalEntryNotFoundError, OSError, ValueError):
            raise error from None
        log.warning("note: the hub cannot be reached; %s is as downloaded before", repository)
        root = pathlib.Path(folder)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _choose(known: list[str], file: str | None, name: str) -> str:
    """Returns the file of a repository that has its weights."""
    if file is not None:
        if file not in known:
            raise InputError(f"{name}: the repository has no such file; it has {some(known, 8)}")
        return file
    for candidate in files.IN_FOLDER:
        if candidate in known:
            return candidate
    others = [each for each in known if each.endswith(files.SUFFIXES)]
    if len(others) == 1:
        return others[0]
    raise InputError(
        f"{name}: which file has the weights? The repository has {some(others or known, 8)}; name "
        "one as hf:OWNER/REPO/FILE"
    )


def _check_space(hub: ModuleType, repository: str, revision: str | None, wanted: list[str]) -> None:
    """Logs what is to be downloaded; raises an `InputError` if the disk has no room for it."""
    plans = [
        hub.hf_hub_download(repository, file, revision=revision, dry_run=True) for file in wanted
    ]
    size = sum(plan.file_size for plan in plans if plan.will_download)
    if not size:
        return
    cache = pathlib.Path(hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size > free:
        raise InputError(
            f"{repository} needs {size / 1e9:.3g} GB in {cache}, which has {free / 1e9:.3g} GB "
            "left; make room, or set HF_HOME to a larger disk"
        )
    log.warning("note: downloading %.3g MB of %s to %s", size / 1e6, repository, cache)


def _reason(hub: ModuleType, error: Exception) -> str:
    """Returns in one line why a download failed, and what to do."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return "its owner has to grant access; ask on its page, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return "there is no such file"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    return f"{first_line(error)}; without a network, download the files elsewhere and name a folder"
