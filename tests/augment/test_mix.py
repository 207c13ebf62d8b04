"""MixUp and CutMix: targets follow the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.augment.mix import BatchTransform, erase, mix, normalize
from spvit_jax.augment.randaugment import RandAugment


def batch(size=6):
    """Images whose value is the example's number, and targets that are one-hot."""
    images = jnp.broadcast_to(jnp.arange(float(size))[:, None, None, None], (size, 16, 16, 3))
    return images, jnp.eye(size)


def test_normalize():
    image = np.array([[[[0, 128, 255]]]], np.uint8)
    out = normalize(image, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
    expected = [(0 - 0.5) / 0.25, (128 / 255 - 0.4) / 0.5, (1 - 0.3) / 1.0]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("settings", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_target_is_the_share_of_the_pixels(seed, settings):
    images, targets = batch()
    mixed, mixed_targets = mix(images, targets, jax.random.key(seed), **settings)
    assert mixed_targets.sum(1) == pytest.approx(np.ones(6), abs=1e-6)
    # The mean pixel is the mean of the two numbers, weighted as the target is.
    expected = (mixed_targets * jnp.arange(6.0)).sum(1)
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-4)


def test_mixup_blends_and_cutmix_pastes():
    images, targets = batch()
    blended, _ = mix(images, targets, jax.random.key(0), mixup=0.8, cutmix=0.0)
    assert (blended == blended[:, :1, :1]).all()
    pasted, _ = mix(images, targets, jax.random.key(0), mixup=0.0, cutmix=1.0)
    assert set(np.unique(pasted[0])) <= {0.0, 5.0}


def test_probabilities():
    images, targets = batch()
    keys = jax.random.split(jax.random.key(0), 400)

    @jax.jit
    @jax.vmap
    def kind(key):
        settings = {"mixup": 0.8, "cutmix": 1.0, "probability": 0.6, "switch_probability": 0.25}
        mixed, _ = mix(images, targets, key, **settings)
        return (mixed[0] != 0).any(), (mixed[0] == mixed[0, :1, :1]).all()

    changed, uniform = kind(keys)
    assert np.mean(changed) == pytest.approx(0.6, abs=0.08)
    assert np.mean(~uniform) == pytest.approx(0.6 * 0.25, abs=0.06)


def test_nothing_is_mixed_when_both_are_off():
    images, targets = batch()
    same = mix(images, targets, jax.random.key(0), mixup=0.0, cutmix=0.0)
    assert same[0] is images
    assert same[1] is targets


def boxes(changed):
    """Rows and columns [B] of what has changed, and whether it is a full rectangle."""
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    return rows, columns, changed.sum((1, 2)) == rows * columns


def test_erasing_fills_a_box_of_timms_sizes_with_noise():
    size, count = 64, 3000
    images = jnp.full((count, size, size, 3), 9.0)
    erased = np.asarray(erase(images, jax.random.split(jax.random.key(0), count), 0.25))
    changed = (erased != 9).all(-1)
    some = changed.any((1, 2))
    assert some.mean() == pytest.approx(0.25, abs=0.04)
    rows, columns, full = boxes(changed[some])
    assert full.all()
    share = rows * columns / size**2
    assert share.min() == pytest.approx(0.02, abs=0.006)
    assert share.max() == pytest.approx(1 / 3, abs=0.02)
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert np.median(rows / columns) == pytest.approx(1, abs=0.15)
    assert (rows / columns).max() < 4
    noise = erased[changed]
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    top, left = changed[some].any(2).argmax(1), changed[some].any(1).argmax(1)
    for start, length in ((top, rows), (left, columns)):
        assert np.mean(start / (size - length)) == pytest.approx(0.5, abs=0.05)


def test_erasing_is_off_and_on():
    images, _ = batch()
    keys = jax.random.split(jax.random.key(0), 6)
    np.testing.assert_array_equal(erase(images, keys, 0.0), images)
    assert (erase(images, keys, 1.0) != images).any((1, 2, 3)).all()


def test_the_whole_transform_is_its_parts_in_order():
    """RandAugment on pixels, then normalising, erasing, and mixing last."""
    images = jax.random.randint(jax.random.key(3), (6, 16, 16, 3), 0, 256).astype(jnp.uint8)
    plain = BatchTransform((0.5,) * 3, (0.25,) * 3)
    out, targets, moves = plain(images, jnp.eye(6), jax.random.key(0))
    assert moves is None
    np.testing.assert_allclose(out, normalize(images, (0.5,) * 3, (0.25,) * 3))
    np.testing.assert_array_equal(targets, jnp.eye(6))

    policy = BatchTransform(
        (0.5,) * 3, (0.25,) * 3, rand_augment=RandAugment(), color_jitter=0.2, erase=0.5, mixup=0.8
    )
    key = jax.random.key(0)
    augment_key, erase_key, mix_key = jax.random.split(key, 3)
    augmented, moves = policy._augment(images, augment_key)
    expected = policy.normalize(augmented)
    whole = (expected * 0.25 + 0.5) * 255
    np.testing.assert_allclose(whole, jnp.round(whole), atol=1e-3)
    expected = erase(expected, jax.random.split(erase_key, 6), 0.5)
    expected = mix(expected, jnp.eye(6), mix_key, mixup=0.8, cutmix=0.0)
    for ours, theirs in zip(policy(images, jnp.eye(6), key), (*expected, moves), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
