"""Window attention against its definition, pair by pair on the whole grid; the family's shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.models.base import Tokens
from spvit_jax.models.naming import named_leaves
from spvit_jax.models.pyramid import PatchMerging
from spvit_jax.models.spatial import LocalityMask
from spvit_jax.models.swin import WindowAttention
from tests.helpers import numpy_models
from tests.helpers.variables import random_variables, run

DIM, HEADS, WINDOW = 12, 3, 4


def expected_attention(x, p, grid, shift, mask):
    """Over all pairs of places of the shifted and padded grid: who shares a window, what bias."""
    (h, w), d = grid, DIM // HEADS
    rows, columns = min(h, WINDOW), min(w, WINDOW)
    height, width = -(-h // rows) * rows, -(-w // columns) * columns
    y, x_ = (axis.ravel() for axis in np.divmod(np.arange(height * width), width))
    # What lies at each place: a patch of the image, or padding.
    patch = (y + shift[0]) % h * w + (x_ + shift[1]) % w
    is_patch = (y < h) & (x_ < w)
    qkv = numpy_models.linear(np.where(is_patch[:, None], x[:, patch], 0), p, "qkv")

    def region_of(position, size, step, moved):
        """A window's number, and whether the place is behind the seam."""
        return position // step, position >= size - moved

    region = np.stack(
        [*region_of(y, height, rows, shift[0]), *region_of(x_, width, columns, shift[1])]
    )
    together = (region[:, :, None] == region[:, None, :]).all(0)
    dy, dx = y[None, :] - y[:, None], x_[None, :] - x_[:, None]
    out = np.empty((len(x), height * width, DIM))
    for head in range(HEADS):
        q, k, v = (qkv[..., i * DIM + head * d : i * DIM + (head + 1) * d] for i in range(3))
        scores = q @ k.transpose(0, 2, 1) / d**0.5
        if "prior/w1" in p:
            w1, b1, w2, b2 = (p[f"prior/{key}"][head] for key in ("w1", "b1", "w2", "b2"))
            hidden = np.maximum(dx[..., None] * w1[:, 0] + dy[..., None] * w1[:, 1] + b1, 0)
            scores = scores * (hidden @ w2 + b2)
        far = (abs(dy) > 1) | (abs(dx) > 1)
        if mask and head in mask.heads and mask.kind == "soft":
            scores = scores * ~far
        bias = p["position/table"][head][
            (dy + rows - 1).clip(0, 2 * rows - 2), (dx + columns - 1).clip(0, 2 * columns - 2)
        ]
        scores = np.where(together, scores + bias, -np.inf)
        if mask and head in mask.heads and mask.kind == "hard":
            scores = np.where(far, -np.inf, scores)
        out[..., head * d : (head + 1) * d] = numpy_models.softmax(scores) @ v
    out = numpy_models.linear(out, p, "proj")
    result = np.empty_like(x)
    result[:, patch[is_patch]] = out[:, is_patch]
    return result


@pytest.mark.parametrize("mask", [None, LocalityMask((0, 1)), LocalityMask((0, 1), kind="hard")])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 12), (6, 9), (3, 8), (4, 4)])
def test_window_attention_equals_its_definition(grid, shifted, mask):
    """With SP-SA's prior in the windows where they are shifted."""
    with jax.enable_x64(True):
        module = WindowAttention(
            DIM,
            HEADS,
            grid=grid,
            window=WINDOW,
            shifted=shifted,
            qkv_bias=True,
            spatial_prior=shifted,
            mask=mask,
            dtype=jnp.dtype("float64"),
            rngs=nnx.Rngs(0),
        )
        rng = np.random.default_rng(0)
        state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), nnx.state(module))
        nnx.update(module, state)
        x = rng.normal(size=(2, grid[0] * grid[1], DIM))
        p = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
        shift = tuple(WINDOW // 2 if shifted and side > WINDOW else 0 for side in grid)
        assert module.shift == shift
        expected = expected_attention(x, p, grid, shift, mask)
        np.testing.assert_allclose(module(jnp.asarray(x), grid), expected, atol=1e-12)


def test_patch_merging_halves_the_grid_and_pads_an_odd_one():
    merging = PatchMerging(3, norm_eps=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5 * 4, 3))
    tokens = merging(Tokens(x, (5, 4), 0))
    merged = tokens.x
    assert merged.shape == (2, 3 * 2, 6)
    assert tokens.grid == (3, 2)
    image = np.pad(np.asarray(x).reshape(2, 5, 4, 3), ((0, 0), (0, 1), (0, 0), (0, 0)))
    corner = np.concatenate([image[:, 4, 2], image[:, 5, 2], image[:, 4, 3], image[:, 5, 3]], -1)
    corner = corner - corner.mean(-1, keepdims=True)
    corner /= np.sqrt((corner**2).mean(-1, keepdims=True) + 1e-5)
    expected = corner @ np.asarray(merging.reduction.kernel[...])
    np.testing.assert_allclose(merged[:, 5], expected, rtol=1e-4, atol=1e-5)


def test_windows_follow_the_image_unless_they_are_given():
    from spvit_jax.models import model_config

    assert model_config("swin_t").window_size == 7
    assert model_config("swin_b", image_size=384).window_size == 12
    assert model_config("swin_b", image_size=(384, 512)).window_size == 12
    assert model_config("swin_b", image_size=384, window=7).window_size == 7
    grids = [grid for grid, _, _ in model_config("swin_t", image_size=(224, 260)).stages()]
    assert grids == [(56, 65), (28, 33), (14, 17), (7, 9)]


def test_attention_maps_are_those_of_the_windows():
    settings = {"image_size": (32, 64), "depths": (2, 1), "dim": 12, "window": 4}
    variables = random_variables("swin_t", **settings)
    images = jax.random.normal(jax.random.key(0), (2, 32, 64, 3))
    maps = jax.jit(lambda x: variables.model().attention_maps(x))(images)
    assert [m.grid for m in maps] == [(4, 4)] * 3
    assert [m.weights.shape for m in maps] == [(16, 3, 16, 16)] * 2 + [(4, 6, 16, 16)]
    for weights, _, _ in maps:
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_padding_of_a_window_has_no_attention_map(layer):
    """The grid of 6×9 patches becomes 8×12, of which 54 places hold a patch."""
    variables = random_variables("swin_t", image_size=(24, 36), depths=(2,), dim=12, window=4)
    images = jax.random.normal(jax.random.key(0), (2, 24, 36, 3))
    maps = jax.jit(lambda x: variables.model().attention_maps(x))(images)
    sums = np.asarray(maps[layer].weights.sum(-1))
    np.testing.assert_allclose(sums[sums > 0], 1, rtol=1e-5)
    np.testing.assert_array_equal((sums > 0).sum((0, 2)), [2 * 54] * 3)


@pytest.mark.parametrize("name", ["swin_t", "cait_xxs24"])
def test_drop_path_and_remat_work_in_every_family(name):
    small = {"depths": (1, 2)} if name == "swin_t" else {"depth": 3}
    small |= {"image_size": 32, "dim": 12, "num_heads": 3, "num_classes": 5, "patch_size": 4}
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    variables = random_variables(name, **small, drop_path=0.5)
    one, other = (
        run(variables, images, jax.random.key(seed), train=True).logits for seed in (0, 1)
    )
    assert one.shape == (8, 5)
    assert (one != other).any()
    remat = random_variables(name, **small, drop_path=0.5, remat=True)
    again = run(remat, images, jax.random.key(0), train=True).logits
    np.testing.assert_allclose(one, again, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="random key"):
        run(variables, images, train=True)
