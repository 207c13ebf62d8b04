"""Measures what the input costs a host, beside timm's own pipeline on the same files.

    python -m benchmarks.input

Makes JPEGs of ImageNet's usual size of scikit-learn's two photographs, and prints the images that
one core makes ready in a second of its time: by this project's host side, of which it sends uint8
and leaves the rest of the recipe to the accelerator, and by timm with Pillow, which does all of it.
All are measured in turns, on one core, and the median of the turns is printed. Needs what the tests
need (`requirements-test.txt`).
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import app
from PIL import Image
from sklearn.datasets import load_sample_images

from spvit_jax.data import pipeline
from spvit_jax.data.augment import TrainTransform
from spvit_jax.data.datasets import FolderSource
from tests.yardstick import timm

FILES = 256
BATCH = 64
WARM_UP, BATCHES = 3, 8  # of each measurement
TURNS = 5
SIZE = 224
POLICY = "rand-m9-mstd0.5-inc1"


def make_files(root: pathlib.Path) -> None:
    """Writes different cuts of the photographs as `root/train/CLASS/*.jpeg`, of about 500×375."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(FILES):
        photo = photographs[number % len(photographs)]
        width = int(rng.integers(400, 600))
        height = int(width * rng.uniform(0.65, 0.8))
        left, top = int(rng.integers(0, 120)), int(rng.integers(0, 80))
        cut = photo.crop((left, top, left + 500, top + 340)).resize((width, height))
        path = root / "train" / str(number % 2) / f"{number:04}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.save(path, quality=92)


def ours(root: pathlib.Path, transform: TrainTransform) -> Iterator[object]:
    """Yields this project's batches, made by one thread."""
    source = FolderSource(root, "train")
    with pipeline.train_batches(source, transform, batch_size=BATCH, seed=0, threads=1) as batches:
        yield from batches


def timms(root: pathlib.Path, *, policy: str | None, whole: bool) -> Iterator[object]:
    """Yields timm's batches, made by the calling thread: its transform, erasing, and MixUp."""
    import torch
    from timm.data import Mixup, create_transform

    torch.set_num_threads(1)
    transform = create_transform(
        SIZE,
        is_training=True,
        auto_augment=policy,
        re_prob=0.25 if whole else 0.0,
        re_mode="pixel",
        interpolation="random",
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    files = sorted((root / "train").rglob("*.jpeg"))
    rng = np.random.default_rng(0)
    while True:
        chosen = rng.integers(0, len(files), BATCH)
        images = torch.stack([transform(Image.open(files[i]).convert("RGB")) for i in chosen])
        yield mixup(images, torch.zeros(BATCH, dtype=torch.long)) if whole else images


def decoding(root: pathlib.Path) -> Iterator[object]:
    """Yields batches of images that Pillow has decoded and nothing else."""
    encoded = [path.read_bytes() for path in sorted((root / "train").rglob("*.jpeg"))]
    while True:
        for start in range(0, FILES, BATCH):
            yield [
                np.asarray(Image.open(io.BytesIO(one)).convert("RGB"))
                for one in encoded[start : start + BATCH]
            ]


def rate(make: Callable[[], Iterator[object]]) -> float:
    """Returns the images made in a second of this process's time, all its threads together."""
    with contextlib.closing(make()) as batches:  # type: ignore[type-var]
        for _ in range(WARM_UP):  # starts threads, compiles, and fills what is read ahead
            next(batches)
        start = time.process_time()
        for _ in range(BATCHES):
            next(batches)
        return BATCHES * BATCH / (time.process_time() - start)


def main(argv: list[str]) -> None:
    """Measures all in turns and prints the medians."""
    del argv
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"timm {timm.__version__}, {FILES} files, one core, medians of {TURNS} turns")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_files(root)
        made: dict[str, Callable[[], Iterator[object]]] = {
            "Pillow, decoding alone": lambda: decoding(root),
            "ours, crop and bilinear": lambda: ours(
                root, TrainTransform((SIZE, SIZE), interpolation="bilinear")
            ),
            "ours, crop and bicubic": lambda: ours(
                root, TrainTransform((SIZE, SIZE), interpolation="bicubic")
            ),
            "ours, the whole host side": lambda: ours(
                root, TrainTransform((SIZE, SIZE), interpolation="random")
            ),
            "timm, crop": lambda: timms(root, policy=None, whole=False),
            "timm, crop and RandAugment": lambda: timms(root, policy=POLICY, whole=False),
            "timm, the whole recipe": lambda: timms(root, policy=POLICY, whole=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(TURNS):
            for name, make in made.items():
                rates[name].append(rate(make))
        medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:28} {value:6.0f} images/s per core")
    ratio = medians["ours, the whole host side"] / medians["timm, the whole recipe"]
    print(f"ours over timm's, host side of the whole recipe: {ratio:.2f}")


if __name__ == "__main__":
    app.run(main)
