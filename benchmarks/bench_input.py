"""Measures what the input costs a host, beside timm's own pipeline on the same files.

    python -m benchmarks.bench_input

Makes JPEGs of ImageNet's usual size of scikit-learn's two photographs, and prints the images that
one core makes ready in a second of its time, at each stage of DeiT's recipe: by this project's host
side, which sends uint8 and leaves the rest of the recipe to the accelerator, and by timm's loader
with Pillow, which does all of it. All are measured in turns, on one core, and medians are printed;
then where the time goes, and the cores that a chip then needs. Needs what the tests need
(`requirements-test.txt`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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
from spvit_jax.data.crops import TrainTransform
from spvit_jax.data.folders import FolderSource
from spvit_jax.data.tensorflow import tf
from spvit_jax.models import model_config
from spvit_jax.models.complexity import count_macs
from tests.helpers.timm_reference import timm

FILES = 256
BATCH = 64
WARM_UP, BATCHES = 3, 8  # of each measurement
TURNS = 5
SIZE = 224
POLICY = "rand-m9-mstd0.5-inc1"
CHIP_FLOPS, UTILISATION = 197e12, 0.4  # of a TPU v5e in bfloat16 (cloud.google.com/tpu/docs/v5e)


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


def ours(root: pathlib.Path, transform: TrainTransform, threads: int = 1) -> Iterator[object]:
    """Yields this project's batches."""
    source = FolderSource(root, "train")
    with pipeline.train_batches(
        source, transform, batch_size=BATCH, seed=0, threads=threads
    ) as batches:
        yield from batches


def nothing(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Reads the file, and no more."""
    return tf.reshape(tf.strings.length(encoded) + tf.cast(seed[0], tf.int32), [1, 1])


def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Decodes the whole image."""
    del seed
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def decode_crop(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws a box and decodes the crop."""
    return TrainTransform((SIZE, SIZE)).crop(encoded, seed)[0]


@dataclasses.dataclass(frozen=True)
class Stage(TrainTransform):
    """A part of what the host does to an image; `make` is of its encoding and a seed."""

    make: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = nothing

    def with_box(
        self, encoded: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns an image of which nothing is kept, so that batching it costs nothing."""
        made = self.make(encoded, seed)
        return tf.reduce_sum(tf.cast(made[:1, :1], tf.int32)), tf.zeros([4]), tf.constant(False)


def timms(root: pathlib.Path, *, policy: str | None, whole: bool) -> Iterator[object]:
    """Yields the batches of timm's loader, made by the calling thread; `whole` mixes and erases."""
    import torch
    from timm.data import ImageDataset, Mixup, create_loader

    torch.set_num_threads(1)
    loader = create_loader(
        ImageDataset(str(root / "train")),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        auto_augment=policy,
        re_prob=0.25 if whole else 0.0,
        re_mode="pixel",
        interpolation="random",
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield mixup(images, labels) if whole else images


def timms_decoding(root: pathlib.Path) -> Iterator[object]:
    """Yields batches of images that Pillow has decoded and nothing else."""
    paths = itertools.cycle(sorted((root / "train").rglob("*.jpeg")))
    while True:
        yield [np.asarray(Image.open(next(paths)).convert("RGB")) for _ in range(BATCH)]


def rate(make: Callable[[], Iterator[object]], clock: Callable[[], float]) -> float:
    """Returns the images made in a second of a clock, all threads together."""
    with contextlib.closing(make()) as batches:  # type: ignore[type-var]
        for _ in range(WARM_UP):  # starts threads, compiles, and fills what is read ahead
            next(batches)
        start = clock()
        for _ in range(BATCHES):
            next(batches)
        return BATCHES * BATCH / (clock() - start)


def main(argv: list[str]) -> None:
    """Measures all in turns and prints the medians."""
    del argv
    cores = os.sched_getaffinity(0)
    transform = TrainTransform((SIZE, SIZE), interpolation="random")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_files(root)
        made: dict[str, Callable[[], Iterator[object]]] = {
            "read": lambda: ours(root, Stage((SIZE, SIZE), make=nothing)),
            "decode": lambda: ours(root, Stage((SIZE, SIZE), make=decode)),
            "decode the crop": lambda: ours(root, Stage((SIZE, SIZE), make=decode_crop)),
            "crop": lambda: ours(root, transform),
            "timm: decode": lambda: timms_decoding(root),
            "timm: crop": lambda: timms(root, policy=None, whole=False),
            "timm: randaugment": lambda: timms(root, policy=POLICY, whole=False),
            "timm: whole": lambda: timms(root, policy=POLICY, whole=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in made}
        os.sched_setaffinity(0, {min(cores)})
        for _ in range(TURNS):
            for name, make in made.items():
                rates[name].append(rate(make, time.process_time))
        per_core = {name: statistics.median(values) for name, values in rates.items()}
        os.sched_setaffinity(0, cores)
        all_cores = rate(lambda: ours(root, transform, len(cores)), time.monotonic)

    print(f"images/s of one core's time, medians of {TURNS} turns; timm {timm.__version__}")
    print(f"{'':32}{'ours':>8}{'timm':>8}{'ratio':>8}")
    host = per_core["crop"]
    for name, mine, theirs in (
        ("decode", per_core["decode"], per_core["timm: decode"]),
        ("crop, resize, flip", host, per_core["timm: crop"]),
        ("and RandAugment *", host, per_core["timm: randaugment"]),
        ("the whole recipe *", host, per_core["timm: whole"]),
    ):
        print(f"{name:32}{mine:8.0f}{theirs:8.0f}{mine / theirs:8.2f}")
    print("* ours on the accelerator, in the step")
    print(f"ours on {len(cores)} cores at once: {all_cores:.0f} images/s of the clock")

    milliseconds = {name: 1000 / value for name, value in per_core.items()}
    resize = milliseconds["crop"] - milliseconds["decode the crop"]
    print("where the time of our host side goes, milliseconds per image")
    print(f"  {'read and batch':30}{milliseconds['read']:8.2f}")
    print(
        f"  {'draw a box, decode the crop':30}"
        f"{milliseconds['decode the crop'] - milliseconds['read']:8.2f}"
    )
    print(f"  {'resize and flip':30}{resize:8.2f}")

    macs = count_macs(model_config("spvit_s"))
    needed = CHIP_FLOPS * UTILISATION / (3 * 2 * macs)
    print(
        f"SP-ViT-S on a TPU v5e at {UTILISATION:.0%} of its peak takes {needed:.0f} images/s: "
        f"{needed / host:.1f} such cores per chip"
    )


if __name__ == "__main__":
    app.run(main)
