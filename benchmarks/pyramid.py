"""Times hierarchical MaiT against our Swin and timm's on this machine: inference and gradient.

    python -m benchmarks.pyramid --sizes=t --pixels=224,384

All models of one row run in one process, in turns, on the same images in float32. Prints images
per second of CPU time of all threads (which other programs change less than the time on the
clock), and MaiT's over each Swin's. timm's Swin has windows of 7 at 224 pixels and of 12 at 384,
as ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from absl import app, flags, logging
from flax import nnx

from spvit_jax.models import create_model
from tests.helpers.timm_reference import timm

_TIMM = {
    "t": "swin_tiny_patch4_window7_224",
    "s": "swin_small_patch4_window7_224",
    "b": "swin_base_patch4_window7_224",
}


def ours(name: str, pixels: int, batch: int, *, train: bool) -> Callable[[], object]:
    """Returns a compiled call of one of our models: its logits, or the gradient of their square."""
    graphdef, params = nnx.split(create_model(name, image_size=pixels))
    images = jnp.ones((batch, pixels, pixels, 3))

    def logits(params: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).outputs(images).logits

    def loss(params: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.sum(logits(params, images) ** 2)

    run = jax.jit(jax.grad(loss) if train else logits)
    return lambda: jax.block_until_ready(run(params, images))


def theirs(size: str, pixels: int, batch: int, *, train: bool) -> Callable[[], object]:
    """Returns a call of timm's Swin, as `ours` one of ours."""
    window = pixels // 32
    model = timm.create_model(_TIMM[size], img_size=pixels, window_size=window).eval()
    images = torch.ones(batch, 3, pixels, pixels)

    def run() -> object:
        if not train:
            with torch.no_grad():
                return model(images)
        model.zero_grad()
        return (model(images) ** 2).sum().backward()

    return run


def images_per_second(
    calls: dict[str, Callable[[], object]], batch: int, rounds: int
) -> dict[str, float]:
    """Returns the best rate of each call in CPU time; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: batch / min(values) for name, values in times.items()}


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.pyramid`: prints a row for each size, resolution and direction."""
    del argv
    logging.set_verbosity(logging.ERROR)  # or JAX says which accelerators it did not find
    torch.set_num_threads(1)  # threads that wait would count as busy
    args = flags.FLAGS
    print("images per second of CPU time: MaiT, Swin, timm's Swin; MaiT over each of the two")
    for size in args.sizes:
        for pixels in map(int, args.pixels):
            for train in (False, True):
                shape = {"pixels": pixels, "batch": args.batch, "train": train}
                calls = {
                    "mait": ours(f"mait_pyramid_{size}", **shape),
                    "swin": ours(f"swin_{size}", **shape),
                    "timm": theirs(size, **shape),
                }
                rates = images_per_second(calls, args.batch, args.rounds)
                cells = " ".join(f"{rate:7.2f}" for rate in rates.values())
                ratios = " ".join(
                    f"{rates['mait'] / rates[name]:5.2f}" for name in ("swin", "timm")
                )
                what = "gradient" if train else "inference"
                print(f"{size} at {pixels}, {what:<9} {cells}   {ratios}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["t", "s", "b"], "Sizes of the models.")
    flags.DEFINE_list("pixels", ["224", "384"], "Sides of the images.")
    flags.DEFINE_integer("batch", 4, "Images of a call.")
    flags.DEFINE_integer("rounds", 3, "Times that each is run; the best counts.")
    app.run(main)
