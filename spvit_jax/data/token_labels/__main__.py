"""Packs, makes and shows token labels, a label for every patch of an image.

    python -m spvit_jax.data.token_labels pack --dataset=imagenet2012 --labels=DIR --output=FILE.npy
    python -m spvit_jax.data.token_labels make --config=CONFIG --checkpoint=PATH --output=FILE.npy
    python -m spvit_jax.data.token_labels show --dataset=digits --labels=FILE.npy --output=FILE.png

`pack` takes the published `.pt` files, named after the data set's images; `make` has a model with a
dense head label the images of the training split; `show` draws one image and its labels. Training
takes the file as `--config.token_labels.path`. Each has flags of its own: `pack --help`.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from spvit_jax import atomic, cli, help, paths, plan
from spvit_jax import config as config_lib
from spvit_jax import weights as weights_lib
from spvit_jax.augment import mix
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.crops import WholeTransform
from spvit_jax.data.sources import Source
from spvit_jax.data.token_labels.store import LabelMaps, write
from spvit_jax.errors import InputError, nearest
from spvit_jax.interop import files
from spvit_jax.training import sharding

_TOP_K = 5  # logits of each token
_COMMANDS = ("pack", "make", "show")


def published(folder: epath.Path, names: list[str]) -> Iterator[np.ndarray | None]:
    """Yields the published label map of each image from the `.pt` file of its name, or None.

    Args:
      folder: folder of the `.pt` files, nested or not.
      names: names of the image files.

    Raises:
      InputError: a `.pt` file is not a label map.
    """
    by_name = _label_files(folder)
    for name in names:
        path = by_name.get(pathlib.PurePath(name).stem)
        if path is None:
            yield None
            continue
        array = files.read_array(path)
        if array.ndim != 4 or array.shape[0] != 2:
            raise InputError(f"{path} has the shape {array.shape}; expected [2, K, h, w]")
        yield array


def _label_files(folder: epath.Path) -> dict[str, epath.Path]:
    """Returns the `.pt` files in a folder, nested or not, by their names without the suffix."""
    if paths.is_remote(folder):
        names = paths.files_below(folder)
    else:
        names = [str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*.pt")]
    return {pathlib.PurePath(name).stem: folder / name for name in names if name.endswith(".pt")}


def predicted(
    config: config_lib.ConfigDict,
    path: epath.Path,
    source: Source,
    *,
    which: str = "best",
    weights: str = "auto",
) -> Iterator[np.ndarray | None]:
    """Yields the label map of each image as predicted by a model with a dense head.

    An image that cannot be read has None.

    Args:
      config: configuration of the model.
      path: checkpoint or file of weights of the model.
      source: the images.
      which: as in `weights.find`.
      weights: as in `weights.find`.

    Raises:
      InputError: the model has no dense head, or its weights cannot be used.
    """
    like = config_lib.model_settings(config, num_classes=source.num_classes)
    found = weights_lib.find(path, like, which=which, weights=weights)
    model = found.adopt_layer_kinds(like)
    found.check(model)
    found.check_class_names(source.class_names, "choose a teacher of the same classes")
    if not getattr(model, "dense_head", False):
        raise InputError(f"{found.where} has no dense head; token labels need LV-ViT or SP-ViT")
    variables = found.load(model, sharding.make_mesh(1, 1, jax.devices()[:1]))
    mean, std = config.data.mean, config.data.std
    kept = min(_TOP_K, source.num_classes)

    @jax.jit
    def label_maps_of(images: jax.Array) -> jax.Array:
        dense = variables.model().outputs(mix.normalize(images, mean, std)).dense
        assert dense is not None  # the model has a dense head
        values, classes = jax.lax.top_k(dense, kept)
        maps = jnp.stack([values, classes.astype(values.dtype)], axis=1)  # [B, 2, N, K]
        return maps.transpose(0, 1, 3, 2).reshape(len(images), 2, kept, *model.grid)

    missing = len(source)
    with pipeline.eval_batches(
        source,
        WholeTransform(model.image_shape),
        batch_size=config.data.eval_batch_size,
        max_unreadable=config.data.max_unreadable,
    ) as batches:
        for batch in batches:
            made = np.asarray(label_maps_of(jnp.asarray(batch["image"])))[:missing]
            missing -= len(made)
            readable = batch["mask"][: len(made)] > 0
            yield from (
                label_map if ok else None for label_map, ok in zip(made, readable, strict=True)
            )


def draw(image: np.ndarray, label_map: np.ndarray, path: epath.Path) -> None:
    """Writes a PNG of an image and, over it, the best class of each cell of its label map."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values, classes = label_map[0, 0].astype(float), label_map[1, 0].astype(int)
    h, w = classes.shape
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    extent = (0, w, h, 0)
    for axis in axes:
        axis.imshow(image, extent=extent)
        axis.set_xticks([])
        axis.set_yticks([])
    shown = axes[1].imshow(values, extent=extent, alpha=0.6, cmap="viridis")
    for y in range(h):
        for x in range(w):
            text = str(classes[y, x])
            axes[1].text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6, color="w")
    found, counts = np.unique(classes, return_counts=True)
    most = ", ".join(str(c) for c in found[np.argsort(-counts)][:3])
    axes[1].set_title(f"best class of each cell; most frequent: {most}", fontsize=8)
    figure.colorbar(shown, ax=axes[1], shrink=0.8, label="largest logit")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the command `pack`, `make` or `show` of the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("--help", "-h"):
        print(
            help.description(help.program(sys.argv, sys.modules[__name__]), sys.modules[__name__])
        )
        return
    if name not in _COMMANDS:
        cli.fail(f"expected what to do with token labels, got {name!r}{nearest(name, _COMMANDS)}")
    del sys.argv[1]
    {"pack": _pack, "make": _make, "show": _show}[name]()


def _pack() -> None:
    source = _source_flags()
    folder = flags.DEFINE_string("labels", None, "Folder of .pt files.", required=True)
    output = _output_flag("The .npy file to write.")
    classes = flags.DEFINE_integer(
        "num_classes", None, "Number of classes; the data set's by default."
    )

    def run() -> None:
        labels, target = paths.parse(folder.value), output()
        images = source()
        names = images.file_names(np.arange(len(images)))
        maps = published(labels, names)
        _write(target, maps, images, classes.value, folder.value)

    cli.run(run)


def _make() -> None:
    config = cli.config_flag()
    path = flags.DEFINE_string("checkpoint", None, "Weights with a dense head.", required=True)
    weights = cli.weights_flags()
    output = _output_flag("The .npy file to write.")

    def run() -> None:
        target = output()
        plan.check_names(config())
        data = config().data
        images = datasets.load(data.dataset, data.train_split, data.data_dir)
        maps = predicted(config(), paths.parse(path.value), images, **weights())
        _write(target, maps, images, None, path.value)

    cli.run(run)


def _show() -> None:
    source = _source_flags()
    path = flags.DEFINE_string("labels", None, "The .npy file of label maps.", required=True)
    index = flags.DEFINE_integer("index", 0, "Index of the image in the split.")
    output = _output_flag("The .png file to write.")

    def run() -> None:
        target = output()
        images, maps = source(), LabelMaps(paths.parse(path.value))
        maps.check(len(images), images.class_names)
        if not 0 <= index.value < len(images):
            raise InputError(f"--index is {index.value}; expected 0 to {len(images) - 1}")
        wanted = np.array([index.value])
        encoded, labels = images.fetch(wanted)
        image = WholeTransform((224, 224))(encoded[0]).numpy()
        draw(image, maps.fetch(wanted, labels)[0], target)
        print(f"image {index.value} of class {labels[0]} with its labels: {target}")

    cli.run(run)


def _source_flags() -> cli.Getter[Source]:
    name = flags.DEFINE_string(
        "dataset", "imagenet2012", "Data set, as data.dataset of a configuration."
    )
    split = flags.DEFINE_string("split", "train", "Split of the data set.")
    data_dir = flags.DEFINE_string("data_dir", "data", "Folder of the TFDS data sets.")
    return lambda: datasets.load(name.value, split.value, data_dir.value)


def _output_flag(text: str) -> cli.Getter[epath.Path]:
    output = flags.DEFINE_string("output", None, text, required=True)
    return lambda: paths.parse_output(output.value)


def _write(
    path: epath.Path,
    maps: Iterator[np.ndarray | None],
    images: Source,
    num_classes: int | None,
    made_of: str,
) -> None:
    if path.suffix != ".npy" or path.exists():
        raise InputError(f"--output is {path}; expected the name of a new file, ending in .npy")
    progress = tqdm(maps, total=len(images), unit="image", disable=not sys.stderr.isatty())
    metadata = write(
        path,
        progress,
        count=len(images),
        num_classes=num_classes or images.num_classes,
        source=str(made_of),
        class_names=images.class_names if num_classes in (None, images.num_classes) else None,
    )
    print(
        f"wrote {path}: {metadata['images'] - metadata['missing']} label maps of the shape "
        f"{'×'.join(map(str, metadata['shape']))}; {metadata['missing']} images have none, and "
        "their label everywhere"
    )


if __name__ == "__main__":
    main()
