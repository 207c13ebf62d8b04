"""Times our models against timm's with `torch.compile` on a GPU, in bfloat16.

    python -m benchmarks.gpu --parts=train,inference --batch=256 --attention=auto,xla
    python -m benchmarks.gpu --parts=pyramid --sizes=t --pixels=224,384 --batch=128

Parts: `train`, the whole step of DeiT-S, LV-ViT-S and SP-ViT-S (`training.step.train_step`: uint8
images to new weights by AdamW, without augmentation and moving average) and that of timm's DeiT-S;
`inference` of DeiT-S; `pyramid`, inference and gradient of hierarchical MaiT, our Swin and timm's.
All programs of one table run in one process, in turns, on the same shapes; a cell is the median.
Ours are there once for each way of attention that is asked for, which `model.attention` names.
PyTorch's train under `torch.autocast`, with float32 weights as ours and fused AdamW, and infer with
weights in bfloat16. Needs JAX and PyTorch for the same GPU, and no TensorFlow.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

# Before JAX is imported: it would take three quarters of the memory that PyTorch needs too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import timm
import torch
from absl import app, flags
from flax import nnx

from configs import deit, lvvit, spvit
from spvit_jax import config as config_lib
from spvit_jax.augment.mix import normalize
from spvit_jax.models import create_model
from spvit_jax.models.implementation import Implementation
from spvit_jax.training import state as state_lib
from spvit_jax.training.optimizer import make_optimizer
from spvit_jax.training.step import StepSettings, train_step

PARTS = ("train", "inference", "pyramid")
_RECIPES = {"deit_s": deit, "lvvit_s": lvvit, "spvit_s": spvit}
_SWIN = {
    "t": "swin_tiny_patch4_window7_224",
    "s": "swin_small_patch4_window7_224",
    "b": "swin_base_patch4_window7_224",
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Run = Callable[[int], None]  # runs a program a number of times and waits for the last


def our_step(name: str, batch: int, *, attention: Implementation) -> Run:
    """Returns the train step of a model by its recipe, without augmentation and moving average."""
    config = _RECIPES[name].get_config("s")
    augment = config.augment
    augment.rand_augment, augment.mix_token = "", False
    augment.erase = augment.mixup = augment.cutmix = config.optim.ema = 0.0
    config.data.batch_size = batch
    config = config_lib.resolve(config, num_examples=1_281_167)
    optimizer = make_optimizer(config)
    model = create_model(name, dtype="bfloat16", attention=attention)
    settings = StepSettings.of(config, num_classes=1000)
    step = functools.partial(train_step, optimizer=optimizer, settings=settings)
    images = jax.random.randint(jax.random.key(0), (batch, 224, 224, 3), 0, 256, jnp.uint8)
    inputs = {"image": images, "label": jnp.arange(batch) % 1000}
    root = jax.random.key(1)
    state = state_lib.create(model, optimizer, ema=False)
    # Leaves that are one array, such as two zeros, could not be donated both.
    state = jax.tree.map(jnp.copy, state)
    compiled = jax.jit(step, donate_argnums=0).lower(state, inputs, root).compile()

    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state = compiled(state, inputs, root)
        jax.block_until_ready(state)

    return run


def timms_step(batch: int, device: str) -> Run:
    """Returns timm's DeiT-S' train step: uint8 images, label smoothing, AdamW, as `our_step`."""
    model = timm.create_model("deit_small_patch16_224", drop_path_rate=0.1).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=0.05, fused=device == "cuda"
    )
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    labels = torch.arange(batch, device=device) % 1000
    mean, std = (255 * torch.tensor(x, device=device) for x in (_MEAN, _STD))

    @torch.compile
    def loss_of(images: Any, labels: Any) -> Any:
        pixels = ((images.float() - mean) / std).permute(0, 3, 1, 2)
        with torch.autocast(device, torch.bfloat16):
            logits = model(pixels)
        return torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    def run(times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            loss_of(images, labels).backward()
            optimizer.step()
        _synchronize(device)

    return run


def ours(name: str, pixels: int, batch: int, *, train: bool, attention: Implementation) -> Run:
    """Returns one of our models' logits, or the gradient of the sum of their squares."""
    model = create_model(name, image_size=pixels, dtype="bfloat16", attention=attention)
    graphdef, params = nnx.split(model)
    images = jax.random.randint(jax.random.key(0), (batch, pixels, pixels, 3), 0, 256, jnp.uint8)

    def logits(params: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).outputs(normalize(images, _MEAN, _STD)).logits

    def loss(params: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.sum(logits(params, images) ** 2)

    compiled = jax.jit(jax.grad(loss) if train else logits).lower(params, images).compile()

    def run(times: int) -> None:
        out = None
        for _ in range(times):
            out = compiled(params, images)
        jax.block_until_ready(out)

    return run


def theirs(name: str, pixels: int, batch: int, device: str, *, train: bool) -> Run:
    """Returns what `ours` does of a model of timm's, compiled by PyTorch."""
    size: dict[str, Any] = {"img_size": pixels}
    if "swin" in name:
        size["window_size"] = pixels // 32
    model = timm.create_model(name, **size).to(device).eval()
    shape = (batch, pixels, pixels, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    mean, std = (255 * torch.tensor(x, device=device) for x in (_MEAN, _STD))
    if not train:
        model = model.bfloat16()

    def pixels_of(images: Any) -> Any:
        return ((images.float() - mean) / std).permute(0, 3, 1, 2)

    @torch.compile
    def logits(images: Any) -> Any:
        return model(pixels_of(images).bfloat16())

    @torch.compile
    def loss(images: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return (model(pixels_of(images)).float() ** 2).sum()

    def run(times: int) -> None:
        for _ in range(times):
            if train:
                model.zero_grad(set_to_none=True)
                loss(images).backward()
            else:
                with torch.inference_mode():
                    logits(images)
        _synchronize(device)

    return run


def each_way(
    make: Callable[..., Run], *models: str, **settings: Any
) -> dict[str, Callable[[], Run]]:
    """Returns what makes the programs of our models, each with each way of attention."""
    return {
        f"{model}, {attention}": functools.partial(make, model, attention=attention, **settings)
        for model in models
        for attention in flags.FLAGS.attention
    }


def tables(device: str) -> Iterator[tuple[str, dict[str, Callable[[], Run]]]]:
    """Yields the title of each table and what makes its programs, by name."""
    args = flags.FLAGS
    batch, make = args.batch, functools.partial
    if "train" in args.parts:
        yield (
            f"train step at 224, {batch} images",
            {
                "timm deit_s": make(timms_step, batch, device),
                **each_way(our_step, *_RECIPES, batch=batch),
            },
        )
    if "inference" in args.parts:
        yield (
            f"inference of DeiT-S at 224, {batch} images",
            {
                "timm deit_s": make(
                    theirs, "deit_small_patch16_224", 224, batch, device, train=False
                ),
                **each_way(ours, "deit_s", pixels=224, batch=batch, train=False),
            },
        )
    for size in args.sizes if "pyramid" in args.parts else ():
        for pixels in map(int, args.pixels):
            for train in (False, True):
                what = "gradient" if train else "inference"
                shape = {"pixels": pixels, "batch": batch, "train": train}
                yield (
                    f"{what} at {pixels}, {batch} images",
                    {
                        f"timm swin_{size}": make(theirs, _SWIN[size], device=device, **shape),
                        **each_way(ours, f"swin_{size}", f"mait_pyramid_{size}", **shape),
                    },
                )


def seconds_of(programs: dict[str, Run], rounds: int, times: int) -> dict[str, float]:
    """Returns the median seconds of each program's call; the programs take turns.

    Args:
      programs: programs by name.
      rounds: times that each has its turn.
      times: calls in a turn, the last of which is waited for.
    """
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        run(2)
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            run(times)
            samples[name].append((time.perf_counter() - start) / times)
    return {name: statistics.median(values) for name, values in samples.items()}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.gpu`: prints a row of Markdown for each program."""
    del argv
    args = flags.FLAGS
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        raise app.UsageError(f"unknown --parts {', '.join(unknown)}; known: {', '.join(PARTS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"{card}, JAX {jax.__version__} on {jax.devices()[0].device_kind}, PyTorch "
        f"{torch.__version__}, timm {timm.__version__}; bfloat16\n",
        flush=True,
    )
    print("| | program | ms | images/s | compiled in, s |\n|---|---|---|---|---|", flush=True)
    for title, makers in tables(device):
        programs, compiled = {}, {}
        for name, maker in makers.items():
            start = time.perf_counter()
            programs[name] = maker()
            programs[name](1)
            compiled[name] = time.perf_counter() - start
        for name, seconds in seconds_of(programs, args.rounds, args.times).items():
            print(
                f"| {title} | {name} | {1000 * seconds:.2f} | {args.batch / seconds:,.0f} "
                f"| {compiled[name]:.0f} |",
                flush=True,
            )
        del programs
        torch.compiler.reset()


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(PARTS), "Parts to run.")
    flags.DEFINE_list("sizes", ["t", "s", "b"], "Sizes of the pyramids.")
    flags.DEFINE_list("pixels", ["224", "384"], "Sides of the pyramids' images.")
    flags.DEFINE_list("attention", ["auto"], "Ways of attention, values of model.attention.")
    flags.DEFINE_integer("batch", 128, "Images of a call.")
    flags.DEFINE_integer("rounds", 7, "Turns of each program.")
    flags.DEFINE_integer("times", 10, "Calls in a turn.")
    app.run(main)
