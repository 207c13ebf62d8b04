"""Measures the input pipeline's images per second on the host, beside timm's on the same files.

    python -m benchmarks.bench_input

Makes JPEGs of ImageNet's usual size of scikit-learn's two photographs, and prints the images that
one core makes ready in a second of its time, at each stage of DeiT's recipe: by this project's host
side, which sends uint8 and leaves erasing and mixing to the accelerator, and by timm's loader with
Pillow, which does all of it. The pipelines alternate on one core, and medians are printed; then the
time of each stage, the number of cores that a chip needs, and the time per image in which Python's
lock (GIL) is held, which bounds what one process can do on any number of cores. Needs what the
tests need (`requirements-test.txt`), and Python 3.11 for the last.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numba
import numpy as np
from absl import app
from PIL import Image
from sklearn.datasets import load_sample_images

from spvit_jax.data import pipeline
from spvit_jax.data.augmentation import Augmentation, RandAugment
from spvit_jax.data.crops import TrainTransform
from spvit_jax.data.folders import FolderSource
from spvit_jax.data.tensorflow import tf
from spvit_jax.models import model_config
from spvit_jax.models.complexity import count_macs
from tests.helpers.timm_reference import timm

FILES = 256
BATCH = 64
WARM_UP, BATCHES = 3, 6  # batches before and in each measurement
GIL_BATCHES = 24
ROUNDS = 5
SIZE = 224
POLICY = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
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

    def prepare(self, encoded: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns a single number for the image, so that batching takes no time."""
        return {"image": tf.reduce_sum(tf.cast(self.process(encoded, seed)[:1, :1], tf.int32))}

    def finish(self, group: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns a group as it is."""
        return group


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


def gil_microseconds(open_batches: Callable[[], Iterator[object]]) -> float:
    """Returns the time per image in which some thread holds the GIL, in microseconds.

    A thread without the GIL looks every tenth of a millisecond whether a thread has it. Its share
    of the samples is taken of the CPU time: a single thread that decodes is always busy, and waits
    for a core as often with the GIL as without.

    Raises:
      RuntimeError: it cannot be seen whether the GIL is held.
    """
    if (busy := _gil_share(_spin)) < 0.9 or (idle := _gil_share(lambda: time.sleep(0.2))) > 0.1:
        raise RuntimeError("cannot see whether the GIL is held; Python 3.11 shows it")
    del busy, idle
    with contextlib.closing(open_batches()) as batches:  # type: ignore[type-var]
        for _ in range(WARM_UP):
            next(batches)
        start = time.process_time()
        share = _gil_share(lambda: [next(batches) for _ in range(GIL_BATCHES)])
        return 1e6 * share * (time.process_time() - start) / (GIL_BATCHES * BATCH)


def _spin() -> None:
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass


def _gil_share(function: Callable[[], object]) -> float:
    """Returns the share of a call's time in which some thread holds the GIL."""
    stop, counts = np.zeros(1, np.int64), np.zeros(2, np.int64)
    _count_held(np.ones(1, np.int64), counts)  # compiles
    counts[:] = 0
    sampler = threading.Thread(target=_count_held, args=(stop, counts))
    sampler.start()
    function()
    stop[0] = 1
    sampler.join()
    held, total = counts.tolist()
    return held / total


_sleep = ctypes.CDLL(None).usleep
_sleep.argtypes = [ctypes.c_uint]
# The state of the thread that holds the GIL, or null. Called without the GIL, which ctypes' own
# calling convention for Python's functions would take.
_holder = ctypes.CFUNCTYPE(ctypes.c_size_t)(
    ctypes.cast(ctypes.pythonapi._PyThreadState_UncheckedGet, ctypes.c_void_p).value or 0
)


@numba.njit(nogil=True)
def _count_held(stop: np.ndarray, counts: np.ndarray) -> None:
    """Adds to `counts` the samples in which the GIL is held, and all, until stop[0] is not 0."""
    while True:
        counts[0] += _holder() != 0
        counts[1] += 1
        if stop[0]:
            return
        _sleep(100)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.bench_input`: measures all pipelines and prints the medians."""
    del argv
    cores = os.sched_getaffinity(0)
    transform = TrainTransform((SIZE, SIZE), interpolation="random")
    augmentation = Augmentation(rand_augment=RandAugment.parse(POLICY), fill=FILL)
    augmented = dataclasses.replace(transform, augmentation=augmentation)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_files(root)
        pipelines: dict[str, Callable[[], Iterator[object]]] = {
            "read": lambda: our_batches(root, Stage((SIZE, SIZE), process=read)),
            "decode": lambda: our_batches(root, Stage((SIZE, SIZE), process=decode)),
            "decode the crop": lambda: our_batches(root, Stage((SIZE, SIZE), process=decode_crop)),
            "crop": lambda: our_batches(root, transform),
            "augment": lambda: our_batches(root, augmented),
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
        all_cores = rate(lambda: our_batches(root, augmented, len(cores)), time.monotonic)
        gil = gil_microseconds(lambda: our_batches(root, augmented))

    print(f"images/s of one core's time, medians of {ROUNDS} rounds; timm {timm.__version__}")
    print(f"{'':32}{'ours':>8}{'timm':>8}{'ratio':>8}")
    host = per_core["augment"]
    for name, ours, timms in (
        ("decode", per_core["decode"], per_core["timm: decode"]),
        ("crop, resize, flip", per_core["crop"], per_core["timm: crop"]),
        ("and RandAugment", host, per_core["timm: randaugment"]),
        ("the whole recipe *", host, per_core["timm: whole"]),
    ):
        print(f"{name:32}{ours:8.0f}{timms:8.0f}{ours / timms:8.2f}")
    print("* erasing and mixing: ours on the accelerator, in the step")
    print(f"ours on {len(cores)} cores at once: {all_cores:.0f} images/s of the clock")

    milliseconds = {name: 1000 / value for name, value in per_core.items()}
    stages = ("read", "decode the crop", "crop", "augment")
    names = ("read and batch", "draw a box, decode the crop", "resize and flip", "RandAugment")
    print("where the time of our host side goes, milliseconds per image")
    before = 0.0
    for stage, name in zip(stages, names, strict=True):
        print(f"  {name:30}{milliseconds[stage] - before:8.2f}")
        before = milliseconds[stage]
    print(
        f"the GIL is held for {gil:.0f} µs per image: one process makes at most {1e6 / gil:.0f}/s"
    )

    macs = count_macs(model_config("spvit_s"))
    needed = CHIP_FLOPS * UTILISATION / (3 * 2 * macs)
    print(
        f"SP-ViT-S on a TPU v5e at {UTILISATION:.0%} of its peak takes {needed:.0f} images/s: "
        f"{needed / host:.1f} such cores per chip"
    )


if __name__ == "__main__":
    app.run(main)
