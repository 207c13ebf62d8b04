"""Token labels: ROI-align against its definition, labels that move with pixels, and the files."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from spvit_jax.augment.label_maps import align, roi_align, scatter
from spvit_jax.augment.mix import mix_tokens, partners
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.augmentation import Augmentation, Operation, RandAugment
from spvit_jax.data.crops import TrainTransform
from spvit_jax.data.token_labels.store import LabelMaps, write
from spvit_jax.errors import InputError

BOXES = [
    (0.0, 0.0, 1.0, 1.0),
    (0.1, 0.25, 0.62, 0.9),
    (0.0, 0.4, 0.5, 1.0),  # at the border
    (0.31, 0.77, 0.36, 0.79),  # smaller than a bin
    (0.5, 0.0, 1.0, 0.01),
]


def bilinear(image, y, x):
    """A sample of [h, w, C] at a place, as the definition has it."""
    h, w = image.shape[:2]
    if y < -1 or y > h or x < -1 or x > w:
        return np.zeros(image.shape[2])
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    dy, dx = y - y0, x - x0
    return (1 - dy) * ((1 - dx) * image[y0, x0] + dx * image[y0, x1]) + dy * (
        (1 - dx) * image[y1, x0] + dx * image[y1, x1]
    )


def direct_roi_align(image, box, grid):
    """Cell by cell and sample by sample, in float64."""
    h, w = image.shape[:2]
    top, left, bottom, right = (v * s - 0.5 for v, s in zip(box, (h, w, h, w), strict=True))
    rows, columns = (bottom - top) / grid[0], (right - left) / grid[1]
    counts = math.ceil(rows), math.ceil(columns)
    out = np.zeros((*grid, image.shape[2]))
    for i in range(grid[0]):
        for j in range(grid[1]):
            for a in range(counts[0]):
                for b in range(counts[1]):
                    y = top + (i + (a + 0.5) / counts[0]) * rows
                    x = left + (j + (b + 0.5) / counts[1]) * columns
                    out[i, j] += bilinear(image, y, x) / (counts[0] * counts[1])
    return out


@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (1, 1), (5, 9)])
@pytest.mark.parametrize("box", BOXES)
def test_roi_align_equals_its_definition(box, grid):
    image = np.random.default_rng(0).normal(size=(18, 18, 4))
    with jax.enable_x64(True):
        ours = roi_align(jnp.asarray(image), jnp.asarray(box), grid)
        np.testing.assert_allclose(ours, direct_roi_align(image, box, grid), rtol=0, atol=1e-6)


def test_roi_align_of_a_constant_is_the_constant():
    constant = roi_align(jnp.full((12, 18, 3), 2.5), jnp.array(BOXES[1]), (7, 5))
    assert constant.shape == (7, 5, 3)
    np.testing.assert_allclose(constant, 2.5, rtol=1e-6)


def test_absent_classes_are_0_and_targets_are_smoothed_probabilities():
    label_map = np.zeros((2, 2, 3, 3), np.float16)
    label_map[0, 0], label_map[0, 1] = 3.0, 1.0
    label_map[1, 0], label_map[1, 1] = 4, 2
    logits = scatter(jnp.asarray(label_map), 6)
    np.testing.assert_array_equal(logits[1, 1], [0, 0, 1, 0, 3, 0])
    box, flip = jnp.array([[0.0, 0.0, 1.0, 1.0]]), jnp.array([False])
    tokens, whole = align(jnp.asarray(label_map)[None], box, flip, (2, 2), 6, smoothing=0.1)
    e = np.exp([0, 0, 1, 0, 3, 0])
    expected = 0.9 * e / e.sum() + 0.1 / 6
    np.testing.assert_allclose(tokens[0], np.tile(expected, (4, 1)), rtol=1e-5)
    np.testing.assert_allclose(whole[0], expected, rtol=1e-5)


def places(size):
    """The y and x of the centres of a grid's cells, as shares of its sides."""
    centres = (np.arange(size) + 0.5) / size
    return np.meshgrid(centres, centres, indexing="ij")


def coordinate_map(size=18, classes=3):
    """A label map whose logits of class 0 and 1 are a cell's x and y, as shares; 2 is certain."""
    y, x = np.meshgrid(
        (np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size, indexing="ij"
    )
    values = np.stack([x, y, np.ones_like(x)])
    numbers = np.broadcast_to(np.arange(classes)[:, None, None], values.shape)
    return jnp.asarray(np.stack([values, numbers])[None].astype(np.float16))


def aligned_coordinates(maps, box, flip, grid, moves=None, **options):
    """The x and y that a crop's tokens have been given, [h, w, 2], and where they are known."""
    tokens, _ = align(maps, jnp.asarray([box]), jnp.array([flip]), grid, 3, moves=moves, **options)
    logits = np.log(np.asarray(tokens)).reshape(*grid, 3)
    # Softmax forgets a constant; the class that is always 1 gives it back.
    known = logits - logits[..., 2:] + 1
    return known[..., :2]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0.1, 0.2, 0.8, 0.7), (0.0, 0.5, 1.0, 1.0)])
def test_labels_are_cropped_and_flipped_with_the_pixels(box, flip):
    grid = (7, 5)
    y0, x0, y1, x1 = box
    ys = y0 + (np.arange(7) + 0.5) / 7 * (y1 - y0)
    xs = x0 + (np.arange(5) + 0.5) / 5 * (x1 - x0)
    expected = np.stack(np.meshgrid(xs[::-1] if flip else xs, ys), -1)
    found = aligned_coordinates(coordinate_map(), box, flip, grid)
    np.testing.assert_allclose(found, expected, atol=0.03)


def warped_coordinates(name, sign, size=112, grid=14, flip=False):
    """What a warp makes of an image of coordinates.

    Returns the mean x and y of the pixels of each cell [grid, grid, 2], as shares; whether all of
    them are from inside the image; and the warp's affine map, as a batch has it [1, 3, 3].
    """
    y, x = places(size)
    image = np.stack([200 * x, 200 * y, 0 * x], -1).astype(np.uint8)
    image = np.ascontiguousarray(image[:, ::-1]) if flip else image
    argument = sign * (18.0 if name == "ROTATE" else 0.2)
    operations = np.array([[Operation[name], argument, 0]])
    warped = image[None].copy()
    moves = Augmentation(fill=(255, 255, 255)).apply(warped, operations[None])
    cells = warped[0].reshape(grid, size // grid, grid, size // grid, 3)
    inside = (cells[..., 2] == 0).all((1, 3))
    assert inside.mean() > 0.4
    return cells[..., :2].mean((1, 3)) / 200, inside, jnp.asarray(moves)


@pytest.mark.parametrize(
    "name", [operation.name for operation in Operation if operation >= Operation.ROTATE]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_labels_are_moved_with_the_pixels(name, sign):
    """An image of coordinates and its label map of coordinates go through the same operation."""
    cells, inside, moves = warped_coordinates(name, sign)
    found = aligned_coordinates(coordinate_map(), (0.0, 0.0, 1.0, 1.0), False, (14, 14), moves)
    np.testing.assert_allclose(found[inside], cells[inside], atol=0.04)


def test_official_axes_take_x_for_y():
    box = (0.0, 0.5, 1.0, 1.0)  # the right half
    ours = aligned_coordinates(coordinate_map(), box, False, (6, 6))
    theirs = aligned_coordinates(coordinate_map(), box, False, (6, 6), official_axes=True)
    assert ours[..., 0].min() > 0.5
    assert theirs[..., 1].min() > 0.5  # the bottom half
    assert theirs[..., 0].min() < 0.2


def test_mix_token_gives_each_group_a_box_and_pairs_it_reversed():
    batch, grid = 16, (6, 5)
    numbers = jnp.broadcast_to(jnp.arange(16.0)[:, None, None, None], (batch, *grid, 1))
    mixed, boxes = mix_tokens(numbers, jax.random.key(3), 4)
    pairs = np.arange(16).reshape(4, 4)[:, ::-1].ravel()
    np.testing.assert_array_equal(partners(jnp.arange(16), 4), pairs)
    expected = np.where(np.asarray(boxes), pairs[:, None, None], np.arange(16)[:, None, None])
    np.testing.assert_array_equal(mixed[..., 0], expected)
    by_group = np.asarray(boxes).reshape(4, 4, -1)
    assert (by_group == by_group[:, :1]).all()
    assert len({group[0].tobytes() for group in by_group}) == 4
    # Mixing what was mixed gives back what there was: the boxes of a pair are the same.
    again = jnp.where(boxes[..., None], partners(mixed, 4), mixed)
    np.testing.assert_array_equal(again, numbers)


def maps_of(count, missing=()):
    rng = np.random.default_rng(0)
    for index in range(count):
        numbers = np.stack([rng.permutation(10)[:5] for _ in range(9)], -1).reshape(5, 3, 3)
        values = np.sort(rng.normal(size=(5, 3, 3)))
        yield None if index in missing else np.stack([values, numbers]).astype(np.float16)


def test_what_is_written_is_read_in_any_order(tmp_path):
    path = tmp_path / "new" / "labels.npy"
    facts = write(path, maps_of(20, {0, 7}), count=20, num_classes=10, source="a test")
    assert (facts["images"], facts["missing"]) == (20, 2)
    assert json.loads(path.with_suffix(".json").read_text())["source"] == "a test"
    maps = LabelMaps(path)
    assert (len(maps), maps.shape, maps.num_classes, maps.missing) == (20, (5, 3, 3), 10, 2)
    indices, labels = np.array([5, 0, 19, 7]), np.array([1, 2, 3, 8], np.int32)
    fetched = maps.fetch(indices, labels)
    expected = list(maps_of(20))
    np.testing.assert_array_equal(fetched[0], expected[5])
    np.testing.assert_array_equal(fetched[2], expected[19])
    for place in (1, 3):
        tokens, whole = align(
            jnp.asarray(fetched[[place]]), jnp.array([BOXES[1]]), jnp.array([True]), (4, 4), 10
        )
        assert (tokens.argmax(-1) == labels[place]).all()
        assert float(whole[0, labels[place]]) > 0.999
    maps.check(20, tuple("0123456789"))
    with pytest.raises(InputError, match="of 20 images of 10 classes, the split has 21 of 10"):
        maps.check(21, tuple("0123456789"))


def test_files_that_are_not_label_maps(tmp_path):
    with pytest.raises(InputError, match="is not a file of token labels"):
        LabelMaps(tmp_path / "none.npy")
    (tmp_path / "page.npy").write_text("<html>")
    with pytest.raises(InputError, match="is not a file of token labels"):
        LabelMaps(tmp_path / "page.npy")
    with pytest.raises(InputError, match="no label map for any"):
        write(tmp_path / "a.npy", iter([None, None]), count=2, num_classes=10, source="")
    with pytest.raises(InputError, match="at most 2048"):
        write(tmp_path / "a.npy", maps_of(2), count=2, num_classes=21_841, source="")
    odd = [np.zeros((2, 5, 3, 3)), np.zeros((2, 5, 4, 4))]
    with pytest.raises(InputError, match=r"label map 1 is \(2, 5, 4, 4\)"):
        write(tmp_path / "a.npy", iter(odd), count=2, num_classes=10, source="")
    assert [path.name for path in tmp_path.iterdir()] == ["page.npy"]


def test_published_files_are_found_by_the_images_names(tmp_path):
    from spvit_jax.data.token_labels.__main__ import published

    (tmp_path / "n01440764").mkdir()
    one = torch.zeros(2, 5, 18, 18, dtype=torch.float16) + 3
    torch.save(one, tmp_path / "n01440764" / "n01440764_10026.pt")
    found = list(published(tmp_path, ["n01440764_10026.JPEG", "n01440764_10027.JPEG"]))
    np.testing.assert_array_equal(found[0], one.numpy())
    assert found[1] is None
    torch.save({"a": one}, tmp_path / "n02.pt")
    with pytest.raises(InputError, match="expected a tensor"):
        list(published(tmp_path, ["n02.JPEG"]))


def test_label_maps_travel_with_their_images(data_dir, tmp_path):
    """Through shuffling, subsets, restarts and processes: each image's own map, box and flip."""
    source = datasets.load("digits", "train", data_dir)
    path = tmp_path / "labels.npy"

    def numbered():
        for index in range(len(source)):
            one = np.zeros((2, 5, 3, 3), np.float16)
            one[1] = np.arange(5)[:, None, None]
            one[0, 0] = index % 1000
            one[0, 1] = index // 1000
            yield one

    write(path, numbered(), count=len(source), num_classes=10, source="numbers")
    subset = datasets.balanced_subset(source, 100, seed=0)

    def take(images, share):
        with pipeline.train_batches(
            images,
            TrainTransform(
                (12, 12), (0.5, 0.9), augmentation=Augmentation(rand_augment=RandAugment())
            ),
            batch_size=32,
            seed=1,
            start_step=3,
            label_maps=LabelMaps(path),
            shard=share,
        ) as batches:
            return next(batches)

    for images in (source, subset):
        batch = take(images, pipeline.BatchShard())
        halves = [take(images, pipeline.BatchShard(index, 2)) for index in range(2)]
        for key, whole in batch.items():
            np.testing.assert_array_equal(whole, np.concatenate([half[key] for half in halves]))
        places = images.places(batch["index"])
        numbers = batch["label_map"][:, 0, 0, 0, 0] + 1000 * batch["label_map"][:, 0, 1, 0, 0]
        np.testing.assert_array_equal(numbers, places)
        y0, x0, y1, x1 = batch["box"].T
        assert ((y0 >= 0) & (x0 >= 0) & (y1 <= 1) & (x1 <= 1)).all()
        area = (y1 - y0) * (x1 - x0)
        assert ((area > 0.35) & (area <= 1)).all()
        assert 0 < batch["flip"].mean() < 1
        moved = (batch["move"] != np.eye(3)).any((1, 2))
        assert 0 < moved.mean() < 0.6


@pytest.mark.parametrize("name", ["TRANSLATE_X", "ROTATE"])
def test_labels_are_flipped_before_they_are_moved(name):
    """As the pixels are."""
    cells, inside, moves = warped_coordinates(name, 1.0, flip=True)
    found = aligned_coordinates(coordinate_map(), (0.0, 0.0, 1.0, 1.0), True, (14, 14), moves)
    np.testing.assert_allclose(found[inside], cells[inside], atol=0.04)
