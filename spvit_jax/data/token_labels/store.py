"""Label maps on disk: one array file per split, with random access."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, paths
from spvit_jax.classes import ClassNames, check_same
from spvit_jax.data.sources import Source
from spvit_jax.errors import InputError

_MAX_CLASSES = 2048  # float16 holds integers up to this exactly
_LABEL_LOGIT = 20.0  # logit of the image's label where there is no map


class LabelMaps:
    """Label maps of a split, in the order of its examples.

    Attributes:
      shape: (K, h, w) of each label map: the number of logits, and the grid.
      num_classes: number of classes, C.
      class_names: names of the classes by number; None if the file does not have them.
      missing: number of images without a label map.
    """

    def __init__(self, path: epath.Path):
        """Opens a file of label maps that `write` has written.

        Raises:
          InputError: the file is missing or incomplete.
        """
        try:
            self._maps = _RemoteArray(path) if paths.is_remote(path) else np.load(path, "r")
            metadata = json.loads(_metadata_path(path).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is not a file of token labels: {error}; make one with "
                "python -m spvit_jax.data.token_labels"
            ) from error
        channels, height, width = self._maps.shape[2:]
        self.shape = (channels, height, width)
        self.num_classes, self.missing = metadata["num_classes"], metadata["missing"]
        names = metadata.get("class_names")
        self.class_names: ClassNames | None = None if names is None else tuple(names)

    def __len__(self) -> int:
        return len(self._maps)

    def fetch(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns the label maps [n, 2, K, h, w] float16 of examples; thread safe.

        An image without a label map gets one with its label in every cell.

        Args:
          indices: indices [n] of the examples in the split.
          labels: labels [n] of the examples.
        """
        maps = np.array(self._maps[indices])
        missing = maps[:, 1, 0, 0, 0] < 0
        maps[missing] = 0
        maps[missing, 1] = np.arange(self.shape[0])[:, None, None]
        # K different classes, the first of them the label and the only one with a logit.
        maps[missing, 1] += labels[missing, None, None, None]
        maps[missing, 1] %= self.num_classes
        maps[missing, 0, 0] = _LABEL_LOGIT
        return maps

    def check(self, num_examples: int, class_names: ClassNames) -> None:
        """Raises an `InputError` unless the label maps are of a split of this size and classes."""
        if (len(self), self.num_classes) != (num_examples, len(class_names)):
            raise InputError(
                f"the token labels are of {len(self)} images of {self.num_classes} classes, the "
                f"split has {num_examples} of {len(class_names)}; make them for the same split"
            )
        if self.class_names is not None:
            what = "the token labels are of other classes than the split has"
            check_same(self.class_names, class_names, what, "make them for the same split")


class _RemoteArray:
    """Array file in a bucket, of which only the rows that are asked for are read.

    Attributes:
      shape: shape of the array.
    """

    def __init__(self, path: epath.Path):
        """Reads the file's header.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is not an array file that `write` has written.
        """
        self._path = str(path)
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is not an array file of version 1.0")
            self.shape, by_column, self._dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if by_column:
            raise ValueError("its rows are not in one piece each")
        self._row = math.prod(self.shape[1:]) * self._dtype.itemsize  # bytes
        if paths.size(path) < self._start + len(self) * self._row:
            raise ValueError("it is cut off")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        starts = [self._start + int(index) * self._row for index in indices]
        ends = [start + self._row for start in starts]
        rows = paths.read_ranges([self._path] * len(starts), starts, ends)
        return np.frombuffer(b"".join(rows), self._dtype).reshape(-1, *self.shape[1:])


def open_label_maps(config: ConfigDict, source: Source) -> LabelMaps | None:
    """Opens the label maps that a configuration names; None if it names none.

    Args:
      config: a configuration with the fields of `spvit_jax.config.base`.
      source: the whole training split.

    Raises:
      InputError: the label maps cannot be read or are of another split, or MixUp or CutMix is on,
        which label maps cannot follow.
    """
    if not config.token_labels.path:
        return None
    if config.augment.mixup or config.augment.cutmix:
        raise InputError(
            "token labels follow crops and not MixUp or CutMix; set config.augment.mixup=0 and "
            "config.augment.cutmix=0, and augment.mix_token for MixToken"
        )
    label_maps = LabelMaps(paths.parse(config.token_labels.path))
    label_maps.check(len(source), source.class_names)
    return label_maps


def write(
    path: epath.Path,
    maps: Iterable[np.ndarray | None],
    *,
    count: int,
    num_classes: int,
    source: str,
    class_names: ClassNames | None = None,
) -> dict[str, Any]:
    """Writes label maps, whole or not at all.

    Args:
      path: path of the file, `*.npy`; metadata go to a `.json` file beside it.
      maps: for each example in order, its label map [2, K, h, w], or None if it has none.
      count: number of examples.
      num_classes: number of classes, C.
      source: origin of the label maps in words.
      class_names: names of the classes by number; None if not known.

    Returns:
      The metadata: `images`, `missing`, `num_classes`, `class_names`, `shape`, `source`.

    Raises:
      InputError: there are too many classes, no map at all, or maps of different shapes.
    """
    if num_classes > _MAX_CLASSES:
        raise InputError(f"token labels of {num_classes} classes; at most {_MAX_CLASSES} fit")
    try:
        with atomic.replacing(path) as array, atomic.replacing(_metadata_path(path)) as text:
            with array.open("wb") as file:
                shape, missing = _write_array(file, maps, count)
            metadata = {
                "images": count,
                "missing": missing,
                "num_classes": num_classes,
                "class_names": class_names,
                "shape": shape,
                "source": source,
            }
            text.write_text(json.dumps(metadata, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return metadata


def _write_array(
    file: BinaryIO, maps: Iterable[np.ndarray | None], count: int
) -> tuple[tuple[int, ...], int]:
    """Writes label maps one by one to an array file; a missing one is -1 everywhere.

    Not through a memory map, with which a full disk kills the process without an error.

    Returns:
      The shape of a label map, and the number of missing ones.
    """
    no_map: np.ndarray | None = None
    missing = 0
    for index, label_map in enumerate(maps):
        if label_map is None:
            missing += 1
        elif no_map is None:
            no_map = np.full(label_map.shape, -1, "<f2")
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, *label_map.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(index):
                file.write(no_map.tobytes())
        elif label_map.shape != no_map.shape:
            raise InputError(f"label map {index} is {label_map.shape}; expected {no_map.shape}")
        if no_map is not None:
            file.write((no_map if label_map is None else label_map.astype("<f2")).tobytes())
    if no_map is None:
        raise InputError("there is no label map for any of the images")
    return no_map.shape, missing


def _metadata_path(path: epath.Path) -> epath.Path:
    return path.with_suffix(".json")
