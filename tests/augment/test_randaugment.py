"""Which operations are drawn, how strong, and where they say that pixels have gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from spvit_jax import config as config_lib
from spvit_jax.augment import randaugment
from spvit_jax.augment.mix import BatchTransform
from spvit_jax.augment.randaugment import RandAugment
from spvit_jax.errors import InputError
from tests.helpers.timm_reference import auto_augment, create_transform

COUNT = 10_000


def test_the_operations_are_timms():
    assert sorted(randaugment.OPERATIONS) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)


def test_the_notation_is_timms():
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9, 0.5, 2, 0.5)
    assert RandAugment.parse("rand-n3-m7-mstd0.5-inc1-p0.7") == RandAugment(7, 0.5, 3, 0.7)
    theirs = auto_augment.rand_augment_transform("rand-n3-m9-mstd0.5-inc1", {})
    ours = RandAugment.parse("rand-n3-m9-mstd0.5-inc1")
    assert theirs.num_layers == ours.layers
    assert {op.prob for op in theirs.ops} == {ours.probability}
    assert {op.magnitude for op in theirs.ops} == {ours.magnitude}
    assert {op.magnitude_std for op in theirs.ops} == {ours.std}


@pytest.mark.parametrize(
    "text",
    ["rand", "rand-m9", "rand-m9-inc0", "aug-m3-inc1", "rand-m9-q3-inc1", "rand-m12-inc1"],
)
def test_a_notation_that_is_not_timms(text):
    with pytest.raises(InputError, match="expected for example 'rand-m9-mstd0"):
        RandAugment.parse(text)


def test_draws_are_distributed_as_timms():
    policy = RandAugment()
    keys = jax.random.split(jax.random.key(0), COUNT)
    draws = jax.jit(jax.vmap(policy.draw))(keys)
    frequency = np.bincount(np.asarray(draws.operation), minlength=15) / COUNT
    assert len(frequency) == 15
    # Four standard errors of a share of 1/15 and of 1/2.
    np.testing.assert_allclose(frequency, 1 / 15, atol=4 * (14 / 225 / COUNT) ** 0.5)
    for share in (draws.active, draws.sign > 0, draws.bicubic):
        assert np.mean(share) == pytest.approx(0.5, abs=4 * 0.5 / COUNT**0.5)
    # timm's strength, by its own words: a normal distribution cut to 0 … 10.
    theirs = np.clip(np.random.default_rng(0).normal(9, 0.5, 1_000_000), 0, 10)
    ours = 10 * np.asarray(draws.level)
    assert ours.max() == 10
    assert ours.mean() == pytest.approx(theirs.mean(), abs=4 * 0.5 / COUNT**0.5)
    assert ours.std() == pytest.approx(theirs.std(), abs=0.02)


@pytest.mark.parametrize("interpolation", ["random", "bicubic", "bilinear"])
def test_warps_interpolate_as_timms_do_beside_the_crop(interpolation):
    notation = "rand-m9-mstd0.5-inc1"
    (theirs,) = (
        stage
        for stage in create_transform(
            224, is_training=True, auto_augment=notation, interpolation=interpolation
        ).transforms
        if isinstance(stage, auto_augment.RandAugment)
    )
    (resample,) = {operation.kwargs["resample"] for operation in theirs.ops}
    config = config_lib.base()
    config.augment.update(rand_augment=notation, interpolation=interpolation)
    policy = BatchTransform.of(config).rand_augment
    draws = jax.vmap(policy.draw)(jax.random.split(jax.random.key(0), 100))
    bicubic = np.broadcast_to(draws.bicubic, 100).tolist()
    names = {True: Image.Resampling.BICUBIC, False: Image.Resampling.BILINEAR}
    expected = set(resample) if isinstance(resample, tuple) else {resample}
    assert {names[value] for value in bicubic} == expected


def test_the_share_of_unchanged_images_is_timms():
    """Both of two operations inactive, a quarter, and those that change nothing in this image."""
    image = jax.random.randint(jax.random.key(1), (8, 8, 3), 0, 256).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2000)
    images = jnp.broadcast_to(image, (len(keys), *image.shape))
    changed, matrices = jax.jit(RandAugment())(images, keys, jnp.zeros(3))
    unchanged = (np.asarray(changed) == np.asarray(image)).all((1, 2, 3))
    assert np.mean(unchanged) == pytest.approx(0.25, abs=0.05)
    still = (np.asarray(matrices) == np.eye(3)).all((1, 2))
    # Each of two layers moves pixels with a probability of 1/2 · 5/15.
    assert np.mean(still) == pytest.approx((5 / 6) ** 2, abs=0.05)


def test_an_image_does_not_depend_on_its_batch():
    images = jax.random.randint(jax.random.key(1), (6, 12, 10, 3), 0, 256).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    policy = RandAugment(layers=3, probability=1.0)
    whole, _ = jax.jit(policy)(images, keys, jnp.zeros(3))
    part, _ = jax.jit(policy)(images[2:4], keys[2:4], jnp.zeros(3))
    np.testing.assert_array_equal(whole[2:4], part)


@pytest.mark.parametrize("seed", range(5))
def test_the_matrix_says_where_pixels_were(seed):
    """On an image whose red and green are its coordinates, through several warps."""
    size = 100
    y, x = jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij")
    image = jnp.stack([x, y, 0 * x], -1).astype(jnp.float32)
    total = jnp.eye(3)
    for layer, key in enumerate(jax.random.split(jax.random.key(seed), 2)):
        operation = 10 + jax.random.randint(key, (), 0, 5)
        image, matrix = randaugment.apply(
            image,
            operation,
            jnp.float32(0.5),
            jnp.float32(1 - 2 * (layer % 2)),
            jnp.full(3, 255.0),
            bicubic=jnp.array(False),
        )
        total = total @ matrix
    inside = np.asarray(image[..., 2] == 0) & np.asarray(image[..., 0] < size)
    assert inside.mean() > 0.3
    places = jnp.stack([x + 0.5, y + 0.5, jnp.ones_like(x)], -1) @ total.T - 0.5
    error = abs(np.asarray(places[..., :2] - image[..., :2]))[inside]
    assert np.median(error) < 1


def test_color_jitter_and_three_augment_change_what_they_should():
    images = jax.random.randint(jax.random.key(1), (200, 8, 8, 3), 0, 256).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    same = randaugment.color_jitter(images, keys, 0.0)
    np.testing.assert_allclose(same, images, atol=1)
    brightness = np.asarray(randaugment.color_jitter(images, keys, 0.3)).mean((1, 2, 3))
    ratio = brightness / np.asarray(images).mean((1, 2, 3))
    assert 0.65 < ratio.min() < 0.8
    assert 1.2 < ratio.max() < 1.35

    changed = np.asarray(randaugment.three_augment(images, keys))
    grey = (changed == changed[..., :1]).all((1, 2, 3))
    solarized = (changed == np.where(images < 128, images, 255 - images)).all((1, 2, 3))
    blurred = ~grey & ~solarized
    for share in (grey, solarized, blurred):
        assert share.mean() == pytest.approx(1 / 3, abs=0.12)
    smoother = changed[blurred].std((1, 2, 3)) < np.asarray(images)[blurred].std((1, 2, 3))
    assert smoother.mean() > 0.8
