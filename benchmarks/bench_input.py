"""Measures the input pipeline's images per second on the host, beside timm's on the same files.

    python -m benchmarks.bench_input

Makes JPEGs of ImageNet's usual size of scikit-learn's two photographs, and prints the images that
one core makes ready in a second of its time, at each stage of DeiT's recipe: by this project's host
side, which sends uint8 and leaves the rest of the recipe to the accelerator, and by timm's loader
with Pillow, which does all of it. The pipelines alternate on one core, and medians are printed;
then the time of each stage, and the number of cores that a chip needs. Needs what the tests need
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
from spvit_jax.data.augmentation import Augmentation, RandAugment
from spvit_jax.data.crops import TrainImage, TrainTransform
from spvit_jax.data.folders import FolderSource
from spvit_jax.data.tensorflow import tf
from spvit_jax.models import model_config
from spvit_jax.models.complexity import count_macs
from tests.helpers.timm_reference import timm

FILES = 256
BATCH = 64
WARM_UP, BATCHES = 3, 8  # batches before and in each measurement
ROUNDS = 5
SIZE = 224
POLICY = "rand-m9-mstd0.5-inc1"
CHIP_FLOPS, UTILISATION = 197e12, 0.4  # of a TPU v5e in bfloat16 (cloud.google.com/tpu/docs/v5e)


def make_files(root: pathlib.Path) -> None:
    """Writes different crops of the photographs as `root/train/CLASS/*.jpeg`, of about 500×375."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(FILES):
        photo = photographs[number % len(photographs)]
        width = int(rng.integers(400, 600))
        height = int(width * rng.uniform(0.65, 0.8))
        left, top = int(rng.integers(0, 120)), int(rng.integers(0, 80))
        crop = photo.crop((left, top, left + 500, top + 340)).resize((width, height))
        path = root / "train" / str(number % 2) / f"{number:04}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=92)


def our_batches(
    root: pathlib.Path, transform: TrainTransform, threads: int = 1
) -> Iterator[object]:
    """Yields training batches of this project's pipeline."""
    source = FolderSource(root, "train")
    with pipeline.train_batches(
        source, transform, batch_size=BATCH, seed=0, threads=threads
    ) as batches:
        yield from batches


def read(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Reads an encoded image, and does not decode it."""
    return tf.reshape(tf.strings.length(encoded) + tf.cast(seed[0], tf.int32), [1, 1])


def decode(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Decodes a whole image."""
    del seed
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def decode_crop(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws a crop box of an image and decodes the crop."""
    return TrainTransform((SIZE, SIZE)).crop(encoded, seed)[0]


@dataclasses.dataclass(frozen=True)
class Stage(TrainTransform):
    """First stages of the host's pipeline, up to the one that is measured.

    Attributes:
      process: maps an encoded image and a seed to a tensor.
    """

    process: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = read

    def with_geometry(self, encoded: tf.Tensor, seed: tf.Tensor) -> TrainImage:
        """Returns a single number for the image, so that batching takes no time."""
        first = tf.reduce_sum(tf.cast(self.process(encoded, seed)[:1, :1], tf.int32))
        return TrainImage(first, tf.zeros([4]), tf.constant(False), tf.eye(3))


def timm_batches(root: pathlib.Path, *, policy: str | None, whole: bool) -> Iterator[object]:
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


def pillow_images(root: pathlib.Path) -> Iterator[object]:
    """Yields batches of images that Pillow decodes, without any augmentation."""
    paths = itertools.cycle(sorted((root / "train").rglob("*.jpeg")))
    while True:
        yield [np.asarray(Image.open(next(paths)).convert("RGB")) for _ in range(BATCH)]


def rate(open_batches: Callable[[], Iterator[object]], clock: Callable[[], float]) -> float:
    """Returns a pipeline's images per second of a clock, all threads together."""
    with contextlib.closing(open_batches()) as batches:  # type: ignore[type-var]
        for _ in range(WARM_UP):  # starts threads, compiles, and fills the prefetch buffers
            next(batches)
        start = clock()
        for _ in range(BATCHES):
            next(batches)
        return BATCHES * BATCH / (clock() - start)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.bench_input`: measures all pipelines and prints the medians."""
    del argv
    cores = os.sched_getaffinity(0)
    transform = TrainTransform((SIZE, SIZE), interpolation="random")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_files(root)
        pipelines: dict[str, Callable[[], Iterator[object]]] = {
            "read": lambda: our_batches(root, Stage((SIZE, SIZE), process=read)),
            "decode": lambda: our_batches(root, Stage((SIZE, SIZE), process=decode)),
            "decode the crop": lambda: our_batches(root, Stage((SIZE, SIZE), process=decode_crop)),
            "crop": lambda: our_batches(root, transform),
            "timm: decode": lambda: pillow_images(root),
            "timm: crop": lambda: timm_batches(root, policy=None, whole=False),
            "timm: randaugment": lambda: timm_batches(root, policy=POLICY, whole=False),
            "timm: whole": lambda: timm_batches(root, policy=POLICY, whole=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in pipelines}
        os.sched_setaffinity(0, {min(cores)})
        for _ in range(ROUNDS):
            for name, open_batches in pipelines.items():
                rates[name].append(rate(open_batches, time.process_time))
        per_core = {name: statistics.median(values) for name, values in rates.items()}
        os.sched_setaffinity(0, cores)
        all_cores = rate(lambda: our_batches(root, transform, len(cores)), time.monotonic)

    print(f"images/s of one core's time, medians of {ROUNDS} rounds; timm {timm.__version__}")
    print(f"{'':32}{'ours':>8}{'timm':>8}{'ratio':>8}")
    host = per_core["crop"]
    for name, ours, timms in (
        ("decode", per_core["decode"], per_core["timm: decode"]),
        ("crop, resize, flip", host, per_core["timm: crop"]),
        ("and RandAugment *", host, per_core["timm: randaugment"]),
        ("the whole recipe *", host, per_core["timm: whole"]),
    ):
        print(f"{name:32}{ours:8.0f}{timms:8.0f}{ours / timms:8.2f}")
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
