"""MixUp and CutMix: targets follow the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.data.mix import mix, normalize


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
