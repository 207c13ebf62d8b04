"""What data exists by name, and which part of it a run uses.

The embedded digits, any TFDS data set, or a folder of images; of them a split, what is held out of
it, or a few examples of each class. How they are read is in `sources.py`, and which of them make up
which batch in `pipeline.py`.
"""

from __future__ import annotations

import logging
import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from spvit_jax.classes import ClassNames
from spvit_jax.data import folders
from spvit_jax.data.sources import Renumbered, Source, Subset, TfdsSource
from spvit_jax.errors import InputError, some

log = logging.getLogger("spvit_jax.data")

MINIVAL = "minival"  # the name of what data.minival holds out of training
_MINIVAL_SEED = 0  # not the run's: runs with other seeds are compared on the same images


def load(name: str, split: str, data_dir: str) -> Source:
    """Opens one split of a data set, and prepares the data set first where that needs no help.

    Args:
      name: "digits", the name of any TFDS data set of images with labels, or "folder:PATH" for
        a folder with one sub-folder per split and in it one per class.
      split: a split's name, for TFDS also a slice such as "train[:1%]".
      data_dir: where TFDS data sets are kept.

    Raises:
      InputError: there is no such data set or split, or it cannot be read.
    """
    if (root := _folder(name)) is not None:
        return folders.FolderSource(root, split)
    return TfdsSource(name, split, data_dir)


def numbered(source: Source, class_names: ClassNames, whose: str) -> Source:
    """Returns a source whose classes have the numbers that they have in a table.

    Args:
      source: of the examples.
      class_names: names by number.
      whose: the classes of the table are, for messages.

    Raises:
      InputError: the table lacks a class of the source; names it.
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
    """Returns evaluation data whose classes have the numbers that they have in trained weights.

    Args:
      source: of the examples.
      data: the section of the configuration.
      class_names: of the weights' classes by number; if None, and the data set is a folder that
        has the training split, those of that split.
      where: the weights are from, for messages.

    Raises:
      InputError: as `numbered`; or the training split cannot be read.
    """
    if class_names is not None:
        return numbered(source, class_names, where)
    root = _folder(data.dataset)
    if root is None or not (root / data.train_split).is_dir():
        return source
    return numbered(source, folders.class_names(root, data.train_split), "the training data")


class Splits(NamedTuple):
    """What a run is trained and evaluated on.

    Attributes:
      whole: the training split, all of it; label maps are about that.
      train: the part of it that is trained on.
      evaluation: what is evaluated on; its classes have the numbers of the training's.
    """

    whole: Source
    train: Source
    evaluation: Source


def open_splits(data: ConfigDict, seed: int) -> Splits:
    """Opens the data that a configuration names; raises as the functions below.

    Args:
      data: the section of the configuration.
      seed: of the draw of `data.train_size`.
    """
    whole = load(data.dataset, data.train_split, data.data_dir)
    train = for_training(whole, data, seed=seed)
    evaluation = for_evaluation(data, data.eval_split)
    return Splits(whole, train, numbered(evaluation, train.class_names, "the training data"))


def for_evaluation(data: ConfigDict, split: str) -> Source:
    """Opens what a configuration's models are evaluated on.

    Args:
      data: the section of the configuration.
      split: as `load`, or "minival" for what `data.minival` holds out of `data.train_split`.

    Raises:
      InputError: as `load`; or nothing is held out.
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
    """Returns what `data.minival` holds out of a whole training split, the same for every seed."""
    return balanced_subset(source, data.minival, seed=_MINIVAL_SEED, field="minival")


def for_training(source: Source, data: ConfigDict, seed: int) -> Source:
    """Returns the part of a training split that a configuration trains on.

    Args:
      source: the whole split.
      data: the section of the configuration: without `minival`, and of the rest `train_size`.
      seed: of the draw of `train_size`.

    Raises:
      InputError: there are not so many examples, or they have several labels each.
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
    """Draws `size` examples at random, as many of each class as can be.

    Args:
      source: what to draw from.
      size: number of examples, or a share of them such as "10%"; a class with too few gives all
        it has and the rest fill up.
      seed: of the draw; smaller subsets of the same seed are part of larger ones.
      field: what the size is called in messages.

    Raises:
      InputError: size cannot be read or is not between 1 and the number of examples.
    """
    size = _number_of(size, len(source), field)
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


def _number_of(size: int | str, total: int, field: str) -> int:
    """Returns a number of examples, given as such or as a percentage of the total."""
    if isinstance(size, int):
        return size
    try:
        return round(total * float(size.removesuffix("%")) / 100) if size[-1:] == "%" else int(size)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{field} is {size!r}; expected a number of examples, or a share such as '10%'"
        ) from error


def _folder(name: str) -> pathlib.Path | None:
    """Returns where a data set is that is a folder of images, or None for another."""
    prefix, colon, path = name.partition(":")
    return pathlib.Path(path) if prefix == "folder" and colon else None
