"""TFDS builder of the handwritten digits that come with scikit-learn, without a download.

1,797 grey images of 8×8 pixels (Alpaydin and Kaynak 1998, UCI), in a fixed split into 1,297 for
training and 500 for testing, stratified by digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_TEST_SIZE = 500
_MAX_PIXEL = 16  # in scikit-learn's images


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, as PNG: `image` uint8 [8, 8, 1] and `label` in 0 … 9."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="The handwritten digits of scikit-learn, with a fixed stratified split.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        # Imported here because the import takes a second, and is needed once.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = digits.target
        train, test = train_test_split(
            np.arange(len(labels)), test_size=_TEST_SIZE, stratify=labels, random_state=0
        )
        return {
            split: self._generate_examples(indices, digits.images, labels)
            for split, indices in {"train": train, "test": test}.items()
        }

    def _generate_examples(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            pixels = np.rint(images[index] * (255 / _MAX_PIXEL)).astype(np.uint8)
            yield index, {"image": pixels[..., None], "label": int(labels[index])}
