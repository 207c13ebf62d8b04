"""Label maps on disk: one array file for a split, read at random as training asks for them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from spvit_jax import atomic
from spvit_jax.classes import ClassNames, check_same
from spvit_jax.data.sources import Source
from spvit_jax.errors import InputError

_MOST_CLASSES = 2048  # that half precision counts exactly
_CERTAIN = 20.0  # logit of the image's label where there is no map


class LabelMaps:
    """The label maps of a split, in the order of its examples.

    Attributes:
      shape: (K, h, w) of each: the number of logits, and the grid.
      num_classes: C.
      class_names: of the classes by number; None if the file does not say.
      missing: how many images have none.
    """

    def __init__(self, path: pathlib.Path):
        """Opens a file that `write` has written.

        Raises:
          InputError: it is not there or not whole.
        """
        try:
            self._maps = np.load(path, mmap_mode="r")
            facts = json.loads(_facts_of(path).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is not a file of token labels: {error}; make one with "
                "python -m spvit_jax.data.token_labels"
            ) from error
        self.shape = self._maps.shape[2:]
        self.num_classes, self.missing = facts["num_classes"], facts["missing"]
        names = facts.get("class_names")
        self.class_names: ClassNames | None = None if names is None else tuple(names)

    def __len__(self) -> int:
        return len(self._maps)

    def fetch(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns the maps [n, 2, K, h, w] float16 of examples; thread safe.

        An image without one has its label everywhere.

        Args:
          indices: [n], of the split.
          labels: [n], the images' labels.
        """
        maps = np.array(self._maps[indices])
        missing = maps[:, 1, 0, 0, 0] < 0
        maps[missing] = 0
        maps[missing, 1] = np.arange(self.shape[0])[:, None, None]
        # Five different classes, the first of them the label and the only one with a logit.
        maps[missing, 1] += labels[missing, None, None, None]
        maps[missing, 1] %= self.num_classes
        maps[missing, 0, 0] = _CERTAIN
        return maps

    def check(self, num_examples: int, class_names: ClassNames) -> None:
        """Raises an `InputError` unless the maps are those of a split of this size and classes."""
        if (len(self), self.num_classes) != (num_examples, len(class_names)):
            raise InputError(
                f"the token labels are of {len(self)} images of {self.num_classes} classes, the "
                f"split has {num_examples} of {len(class_names)}; make them for the same split"
            )
        if self.class_names is not None:
            what = "the token labels are of other classes than the split has"
            check_same(self.class_names, class_names, what, "make them for the same split")


def open_label_maps(config: ConfigDict, source: Source) -> LabelMaps | None:
    """Opens the label maps that a configuration names, if it does.

    Args:
      config: as `spvit_jax.config.base`.
      source: the whole training split.

    Raises:
      InputError: they cannot be read, are of another split, or are mixed in a way that they
        cannot follow.
    """
    if not config.token_labels.path:
        return None
    if config.augment.mixup or config.augment.cutmix:
        raise InputError(
            "token labels follow crops and not MixUp or CutMix; set config.augment.mixup=0 and "
            "config.augment.cutmix=0, and augment.mix_token for MixToken"
        )
    label_maps = LabelMaps(pathlib.Path(config.token_labels.path))
    label_maps.check(len(source), source.class_names)
    return label_maps


def write(
    path: pathlib.Path,
    maps: Iterable[np.ndarray | None],
    *,
    count: int,
    num_classes: int,
    source: str,
    class_names: ClassNames | None = None,
) -> dict[str, Any]:
    """Writes label maps, whole or not at all.

    Args:
      path: the file, `*.npy`; facts go to a `.json` file beside it.
      maps: for each example in order, [2, K, h, w], or None where there is none.
      count: number of examples.
      num_classes: C.
      source: what they were made of, in words.
      class_names: of the classes by number; None if not known.

    Returns:
      The facts: `images`, `missing`, `num_classes`, `class_names`, `shape`, `source`.

    Raises:
      InputError: there are too many classes, no map at all, or maps of different shapes.
    """
    if num_classes > _MOST_CLASSES:
        raise InputError(f"token labels of {num_classes} classes; at most {_MOST_CLASSES} fit")
    try:
        with atomic.replacing(path) as array, atomic.replacing(_facts_of(path)) as text:
            with array.open("wb") as file:
                shape, missing = _write_array(file, maps, count)
            facts = {
                "images": count,
                "missing": missing,
                "num_classes": num_classes,
                "class_names": class_names,
                "shape": shape,
                "source": source,
            }
            text.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return facts


def _write_array(
    file: BinaryIO, maps: Iterable[np.ndarray | None], count: int
) -> tuple[tuple[int, ...], int]:
    """Writes maps one after the other as an array file; -1 everywhere where there is none.

    Not through a memory map: with one a full disk ends the process without a word.

    Returns:
      The shape of each, and how many there are not.
    """
    none: np.ndarray | None = None
    missing = 0
    for index, one in enumerate(maps):
        if one is None:
            missing += 1
        elif none is None:
            none = np.full(one.shape, -1, "<f2")
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, *one.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(index):
                file.write(none.tobytes())
        elif one.shape != none.shape:
            raise InputError(f"label map {index} is {one.shape}; expected {none.shape}")
        if none is not None:
            file.write((none if one is None else one.astype("<f2")).tobytes())
    if none is None:
        raise InputError("there is no label map for any of the images")
    return none.shape, missing


def _facts_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")
