"""Real photographs at any size: scikit-learn's two, each cut on the left and on the right."""

import functools

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

ODD_SIZES = (
    *((427, 640), (640, 427), (333, 500), (500, 375), (375, 499), (281, 533)),
    *((257, 391), (401, 277), (225, 226), (639, 149), (97, 151), (413, 413)),
)


@functools.cache
def odd_photographs():
    """Twelve photographs of `ODD_SIZES`, cut out of scikit-learn's two, those on end turned."""
    images = []
    for number, (height, width) in enumerate(ODD_SIZES):
        photograph = load_sample_images().images[number % 2]
        if height > width:
            photograph = photograph.swapaxes(0, 1)
        images.append(Image.fromarray(photograph[:height, :width]))
    return images


@functools.cache
def photographs(size, count=2):
    """Normalised float64 images [count, height, width, 3], of at most four."""
    height, width = (size, size) if isinstance(size, int) else size
    images = []
    for left in (0, 213):
        for photograph in load_sample_images().images:
            square = Image.fromarray(photograph[:, left : left + 427])
            images.append(np.asarray(square.resize((width, height), Image.Resampling.BICUBIC)))
    return (np.stack(images[:count]) / 255 - MEAN) / STD
