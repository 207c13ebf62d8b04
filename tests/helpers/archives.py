"""ImageNet's archives in small: real photographs, in the published layout, with its odd files."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from spvit_jax.data.imagenet import ARCHIVES

# Two of the classes that have odd files, and those files: one is CMYK, one is a PNG.
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"
CLASSES = ("n01440764", "n01739381", "n02105855", "n07753592")


def photograph(number, mode="RGB", file_format="JPEG"):
    """Returns an encoded cut of one of scikit-learn's two photographs, another for each number."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(number)
    height, width = rng.integers(120, 200, 2).tolist()
    top, left = rng.integers(0, 200, 2).tolist()
    cut = photographs[number % len(photographs)][top : top + height, left : left + width]
    buffer = io.BytesIO()
    Image.fromarray(cut).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def validation_names(numbers):
    return [f"ILSVRC2012_val_{number:08}.JPEG" for number in numbers]


def make(root, *, classes=CLASSES, per_class=8, validation=12, replaced=None):
    """Writes the two archives; `replaced` has the contents of some files instead of photographs.

    `validation` is a number of images, the first ones of the list, or their names.

    A class's photographs are all of one scene, so that there is something to learn.
    """
    root.mkdir(parents=True, exist_ok=True)
    odd = {CMYK: photograph(1, "CMYK"), PNG: photograph(2, file_format="PNG")} | (replaced or {})
    names = pathlib.Path(imagenet_common.label_names_file()).read_text().split()
    with tarfile.open(root / ARCHIVES["train"].file_name, "w") as train:
        for place, wnid in enumerate(classes):
            files = [f"{wnid}_{number}.JPEG" for number in range(per_class)]
            named = [name for name in odd if name.startswith(f"{wnid}_") and name not in files]
            files[-1:] = named or files[-1:]
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number, name in enumerate(files):
                    scene = 2 * (place * per_class + number) + place % 2
                    add(inner, name, odd[name] if name in odd else photograph(scene))
            add(train, f"{wnid}.tar", buffer.getvalue())
    if isinstance(validation, int):
        validation = validation_names(range(1, validation + 1))
    with tarfile.open(root / ARCHIVES["validation"].file_name, "w") as archive:
        for number, name in enumerate(validation, start=1):
            add(archive, name, odd.get(name) or photograph(1000 + number))
    assert set(classes) <= set(names)
    return root
