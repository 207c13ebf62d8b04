"""Data sets by name, and the parts of them that a run trains and evaluates on.

A data set is the embedded digits, any data set of TFDS, or a folder of images; a part is a split, a
held-out subset of one, or a few examples of each class. Examples are read in `sources.py` and
batched in `pipeline.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import paths
from spvit_jax.classes import ClassNames
from spvit_jax.data import folders
from spvit_jax.data.sources import Renumbered, Source, Subset, TfdsSource
from spvit_jax.errors import InputError, some

log = logging.getLogger("spvit_jax.data")

MINIVAL = "minival"  # split name of the examples that data.minival holds out of training
_MINIVAL_SEED = 0  # not the run's: runs with other seeds are compared on the same images

_REGISTERED: dict[str, Callable[[str, str], Source]] = {}


def register_dataset(name: str, open_split: Callable[[str, str], Source]) -> None:
    """Adds a data set, which `data.dataset` then names; it comes before one of TFDS.

    Args:
      name: name of the data set.
      open_split: returns the examples of (split, data_dir); raises an `InputError` for a split that
        does not exist.
    """
    _REGISTERED[name] = open_split


def load(name: str, split: str, data_dir: str) -> Source:
    """Opens one split of a data set; prepares the data set first where that needs no archives.

    Args:
      name: "digits", the name of any TFDS data set of images with labels or of one that
        `register_dataset` has added, or "folder:PATH" for a folder with one sub-folder per split
        and in it one per class.
      split: name of the split, for TFDS also a slice such as "train[:1%]".
      data_dir: folder of the TFDS data sets.

    Raises:
      InputError: the data set or split does not exist or cannot be read.
    """
    if name in _REGISTERED:
        return _REGISTERED[name](split, data_dir)
    if (root := folder_of(name)) is not None:
        return folders.FolderSource(root, split)
    return TfdsSource(name, split, data_dir)


def numbered(source: Source, class_names: ClassNames, whose: str) -> Source:
    """Returns a source with its classes numbered as in `class_names`.

    Args:
      source: the examples.
      class_names: names of the classes by number.
      whose: whose classes these are, for messages.

    Raises:
      InputError: `class_names` lacks a class of the source; names it.
    """
    if source.class_names == class_names:
        return source
    if unknown := sorted(set(source.class_names) - set(class_names)):
        raise InputError(
            f"the data to evaluate on have {len(source.class_names)} classes, and {len(unknown)} "
            f"of them are not among the {len(class_names)} of {whose}: {some(unknown)}; expected "
            f"only {some(class_names)}"
        )
    if absent := sorted(set(class_names) - set(source.class_names)):
        log.warning(
            "warning: the data to evaluate on have no images of %d of the %d classes of %s: %s",
            len(absent),
            len(class_names),
            whose,
            some(absent),
        )
    return Renumbered(source, class_names)


def numbered_as_trained(
    source: Source, data: ConfigDict, class_names: ClassNames | None, where: str
) -> Source:
    """Returns evaluation data with its classes numbered as in trained weights.

    Args:
      source: the evaluation examples.
      data: the section `data` of the configuration.
      class_names: names of the weights' classes by number; if None, and the data set is a folder
        that has the training split, those of that split.
      where: name of the weights' file in messages.

    Raises:
      InputError: as `numbered`; or the training split cannot be read.
    """
    if class_names is not None:
        return numbered(source, class_names, where)
    root = folder_of(data.dataset)
    if root is None or not (root / data.train_split).is_dir():
        return source
    return numbered(source, folders.class_names(root, data.train_split), "the training data")


class Splits(NamedTuple):
    """Training and evaluation data of a run.

    Attributes:
      whole: the whole training split, by whose examples label maps are indexed.
      train: the part of the training split that the run trains on.
      evaluation: the evaluation data, with classes numbered as in training.
    """

    whole: Source
    train: Source
    evaluation: Source


def open_splits(data: ConfigDict, seed: int) -> Splits:
    """Opens the training and evaluation data that a configuration names.

    Args:
      data: the section `data` of the configuration.
      seed: seed of the random draw of `data.train_size` examples.

    Raises:
      InputError: as `load`, `for_training`, `for_evaluation` and `numbered`.
    """
    whole = load(data.dataset, data.train_split, data.data_dir)
    train = for_training(whole, data, seed=seed)
    evaluation = for_evaluation(data, data.eval_split)
    return Splits(whole, train, numbered(evaluation, train.class_names, "the training data"))


def for_evaluation(data: ConfigDict, split: str) -> Source:
    """Opens the evaluation data of a configuration.

    Args:
      data: the section `data` of the configuration.
      split: as in `load`, or "minival" for the examples that `data.minival` holds out of
        `data.train_split`.

    Raises:
      InputError: as `load`; or `split` is "minival" and nothing is held out.
    """
    if split != MINIVAL:
        return load(data.dataset, split, data.data_dir)
    if data.minival is None:
        raise InputError(
            f"split {MINIVAL!r} is what is held out of training, and nothing is; say how much, for "
            "example --config.data.minival=1%"
        )
    return held_out(load(data.dataset, data.train_split, data.data_dir), data)


def held_out(source: Source, data: ConfigDict) -> Source:
    """Returns the examples that `data.minival` holds out of training, the same for every seed."""
    return balanced_subset(source, data.minival, seed=_MINIVAL_SEED, field="minival")


def for_training(source: Source, data: ConfigDict, seed: int) -> Source:
    """Returns the part of a training split that a configuration trains on.

    Args:
      source: the whole training split.
      data: the section `data` of the configuration: `minival` is held out, and `train_size` of the
        rest are drawn.
      seed: seed of the random draw of `train_size` examples.

    Raises:
      InputError: there are too few examples, or they have several labels each.
    """
    if source.several_labels:
        raise InputError(
            f"data set {data.dataset!r} has several labels for an image; it is for evaluation"
        )
    if data.minival is not None:
        minival = held_out(source, data)
        rest = np.setdiff1d(np.arange(len(source)), minival.places(np.arange(len(minival))))
        if not len(rest):
            raise InputError(f"minival is {data.minival}, and leaves nothing to train on")
        source = Subset(source, rest)
    if data.train_size is not None:
        source = balanced_subset(source, data.train_size, seed=seed)
    return source


def balanced_subset(
    source: Source, size: int | str, seed: int, *, field: str = "train_size"
) -> Source:
    """Returns a random subset of `size` examples with the classes as balanced as possible.

    Args:
      source: the examples to draw from.
      size: number of examples, or a percentage of them such as "10%"; a class with too few gives
        all that it has, and the other classes fill up.
      seed: seed of the draw; smaller subsets of a seed are part of its larger ones.
      field: name of the size's field in messages.

    Raises:
      InputError: the size is no number or percentage, or is not in 1 … number of examples.
    """
    size = _num_examples(size, len(source), field)
    if not 1 <= size <= len(source):
        raise InputError(
            f"{field} is {size}; expected 1 to {len(source)}, the number of training examples"
        )
    order = np.random.default_rng(seed).permutation(len(source))
    labels = source.labels()[order]
    # The k-th example of its class comes before any (k+1)-th one.
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(len(order), np.int64)
    rank[by_class] = np.arange(len(order)) - starts
    return Subset(source, order[np.argsort(rank, kind="stable")[:size]])


def _num_examples(size: int | str, total: int, field: str) -> int:
    """Returns the number of examples that a number, or a percentage of the total, stands for."""
    if isinstance(size, int):
        return size
    try:
        return round(total * float(size.removesuffix("%")) / 100) if size[-1:] == "%" else int(size)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{field} is {size!r}; expected a number of examples, or a share such as '10%'"
        ) from error


def folder_of(name: str) -> epath.Path | None:
    """Returns the path of a data set "folder:PATH", or None for other data sets."""
    prefix, colon, path = name.partition(":")
    return paths.parse(path) if prefix == "folder" and colon else None
