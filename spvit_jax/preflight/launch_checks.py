"""Checks of what a launch needs besides a program: data, label maps, initial weights, a workdir.

Each takes seconds, uses the code of training, and changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import paths, weights
from spvit_jax.classes import ClassNames
from spvit_jax.data import datasets, sources
from spvit_jax.data.token_labels.store import open_label_maps
from spvit_jax.errors import InputError
from spvit_jax.training import checkpoint
from spvit_jax.training.run import DataSize, TrainingRun

T = TypeVar("T")

OK, ABSENT, WRONG = "ok", "not here", "wrong"
# Examples of ImageNet-1K by split, with which a run is planned where the data is not.
_IMAGENET = {"train": 1_281_167, "validation": 50_000}
_PUBLISHED_LABEL_MAP = (5, 18, 18)  # (K, h, w) of the token labels that LV-ViT's authors made
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of one check of a launch.

    Attributes:
      what: name of the thing that was checked, such as "data".
      state: `OK`, `WRONG`, or `ABSENT` for data that is not on this machine but of known size.
      words: description of what was found, or the error.
    """

    what: str
    state: str
    words: str


class _ImageNet:
    """A `Source` with the size and classes of ImageNet-1K and no examples, for counting."""

    several_labels = False

    def __init__(self, split: str, class_names: ClassNames):
        self.class_names, self.num_classes = class_names, len(class_names)
        self._size = _IMAGENET[split]

    def __len__(self) -> int:
        return self._size

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def labels(self) -> np.ndarray:
        """Returns labels, int [examples], as even over the classes as the real ones nearly are."""
        return np.arange(self._size) % self.num_classes


def check_data(config: ConfigDict) -> tuple[DataSize, list[Check]]:
    """Counts the data that a configuration names, and checks its label maps.

    Args:
      config: configuration, as `spvit_jax.config.base`.

    Returns:
      The size of the data, and the checks.

    Raises:
      InputError: the data is neither on this machine nor of known size.
    """
    data = config.data
    splits = {data.train_split, data.eval_split} - {datasets.MINIVAL}
    folder = data.dataset.startswith("folder:")
    whole: Any
    builder = None if folder else sources.builder_of(data.dataset, data.data_dir)
    if builder is None or builder.is_prepared():
        whole, train, evaluation = datasets.open_splits(data, seed=config.seed)
        num_train, num_eval = len(train), len(evaluation)
        state, words = OK, data.dataset if folder else f"{data.dataset} in {data.data_dir}"
    elif data.dataset == "imagenet2012" and splits <= set(_IMAGENET):
        whole = _ImageNet(data.train_split, tuple(builder.info.features["label"].names))
        num_train = len(datasets.for_training(whole, data, seed=config.seed))
        if data.eval_split == datasets.MINIVAL:
            num_eval = len(datasets.held_out(whole, data))
        else:
            num_eval = _IMAGENET[data.eval_split]
        state, words = ABSENT, f"no {data.dataset} in {data.data_dir}; planned with"
    else:
        raise InputError(
            f"data set {data.dataset!r} is not in {data.data_dir}, so that its examples cannot be "
            "counted; prepare it there first (training does), or set config.data.data_dir"
        )
    words = f"{words}: {num_train:,} to train on, {num_eval:,} to evaluate on"
    checks, label_map = [Check("data", state, words)], None
    if config.token_labels.path:
        label_map, check = _check("token labels", lambda: _label_maps(config, whole))
        label_map = label_map or _PUBLISHED_LABEL_MAP
        checks.append(check)
    return DataSize(num_train, num_eval, whole.num_classes, label_map, whole.class_names), checks


def check_launch(run: TrainingRun, workdir: epath.Path | None) -> list[Check]:
    """Checks the workdir, unless it is None, and the weights that a run starts from."""
    checks = []
    if workdir is not None:
        checks.append(_check("workdir", lambda: _workdir(run, workdir))[1])
    if run.config.init_from:
        checks.append(_check("init_from", lambda: _init_from(run))[1])
    return checks


def _check(what: str, check: Callable[[], tuple[T, str]]) -> tuple[T | None, Check]:
    try:
        value, words = check()
    except InputError as error:
        return None, Check(what, WRONG, str(error))
    return value, Check(what, OK, words)


def _label_maps(config: ConfigDict, whole: Any) -> tuple[Any, str]:
    maps = open_label_maps(config, whole)
    assert maps is not None  # the configuration names a file
    return maps.shape, f"{config.token_labels.path}, {len(maps):,} maps"


def _init_from(run: TrainingRun) -> tuple[None, str]:
    found = weights.find(paths.parse(run.config.init_from), run.model)
    found.check(run.model, new_head=run.config.init_new_head, class_names=run.data.class_names)
    return None, f"{found.where} fits {run.config.model.name}"


def _workdir(run: TrainingRun, workdir: epath.Path) -> tuple[None, str]:
    """Checks that a workdir can be written to, is not another run's, and has enough disk space."""
    try:
        paths.check_writable(workdir)
    except OSError as error:
        raise InputError(f"{workdir} cannot be written to: {error}") from error
    in_use = checkpoint.newest(workdir) is not None
    config_lib.claim_workdir(workdir, run.config, in_use=in_use, write=False)
    kept = run.config.checkpoint.keep_last + run.config.checkpoint.keep_best + 1
    needed = kept * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract))
    words = f"{kept} checkpoints take {needed / _GIB:.1f} GiB"
    free = paths.free_space(workdir)
    if free is not None:
        words += f", {free / _GIB:.1f} GiB are free"
    if free is not None and needed > free:
        raise InputError(f"{workdir} has no room: {words}")
    return None, f"{workdir} can be written to; {words}"
