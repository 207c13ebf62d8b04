"""A Swin whose windows have been put together by brute force."""

import itertools

import jax
import numpy as np
import pytest

from tests.helpers.attention import layers_of, maps_of
from tests.helpers.variables import random_variables


def whole_matrix(windows, grid, window, shift):
    """The [B, H, N, N] attention of windows [B·W, H, n, n], place by place."""
    (h, w), (rows, columns) = grid, window
    down, across = -(-h // rows), -(-w // columns)
    windows = np.asarray(windows, np.float64)
    windows = windows.reshape(-1, down * across, *windows.shape[1:])
    matrix = np.zeros((len(windows), windows.shape[2], h * w, h * w))

    def patch(i, j, place):
        """The patch at a place of the window in row i and column j, or None for padding."""
        y, x = i * rows + place // columns, j * columns + place % columns
        return None if y >= h or x >= w else (y + shift[0]) % h * w + (x + shift[1]) % w

    for i, j in itertools.product(range(down), range(across)):
        for a, b in itertools.product(range(rows * columns), repeat=2):
            query, key = patch(i, j, a), patch(i, j, b)
            if query is not None and key is not None:
                matrix[:, :, query, key] = windows[:, i * across + j, :, a, b]
    return matrix


@pytest.fixture(scope="module")
def swin():
    """The layers of a Swin, and the [B, H, N, N] matrix of each by brute force.

    In the first stage 6×6 patches in windows of 4×4 are padded.
    """
    settings = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3}
    variables = random_variables("swin_t", **settings, depths=(2, 1), window=4)
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    maps = [attention.weights for attention in maps_of(variables, images)]
    shapes = [((6, 6), (4, 4), (0, 0)), ((6, 6), (4, 4), (2, 2)), ((3, 3), (3, 3), (0, 0))]
    matrices = [whole_matrix(*each) for each in zip(maps, *zip(*shapes, strict=True), strict=True)]
    return layers_of(variables, images), matrices
