"""MixUp and CutMix: targets follow the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from scipy.stats import beta, ks_2samp, kstest

from spvit_jax import config as config_lib
from spvit_jax.augment.mix import (
    BatchTransform,
    check_group_size,
    erase,
    mix,
    mix_tokens,
    normalize,
)
from spvit_jax.errors import InputError
from tests.helpers.timm_reference import Mixup, cutmix_bbox_and_lam


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


def mixes_of(images, mixed):
    """What was done to each image of a `batch`, and the share of its pixels that are its own."""
    result = []
    for own, image in zip(images[:, 0, 0, 0], mixed[..., 0], strict=True):
        others = image[image != own]
        if not len(others):
            result.append(("nothing", 1.0))
        elif np.ptp(image) == 0:
            result.append(("mixup", 0.0))
        else:
            assert len(set(others)) == 1
            result.append(("cutmix", float(np.mean(image == own))))
    return result


def test_each_group_is_mixed_by_a_draw_of_its_own():
    """As timm mixes the batch of each GPU: within a group one draw, between groups none shared."""
    images, targets = batch(64)
    settings = {"mixup": 0.8, "cutmix": 1.0, "probability": 0.8, "group_size": 4}
    mixed, mixed_targets = (
        np.asarray(x) for x in mix(images, targets, jax.random.key(1), **settings)
    )
    kinds, shares = [], []
    for first in range(0, 64, 4):
        group = slice(first, first + 4)
        # Only the group's own images take part, and each with the one at the other end.
        assert mixed_targets[group].sum() == mixed_targets[group, group].sum()
        weights = mixed_targets[group, group]
        np.testing.assert_array_equal(weights * (1 - np.eye(4) - np.eye(4)[::-1]), 0)
        own = np.diag(weights)
        assert (own == own[0]).all()
        found = mixes_of(np.asarray(images[group]), mixed[group])
        assert len(set(found)) == 1
        kinds.append(found[0][0])
        shares.append(float(own[0]))
    assert set(kinds) == {"nothing", "mixup", "cutmix"}
    changed = [share for share, kind in zip(shares, kinds, strict=True) if kind != "nothing"]
    assert len(set(changed)) == len(changed) > 8
    np.testing.assert_allclose(mixed_targets.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("group_size", [64, 128])
def test_fewer_images_than_a_group_are_one(group_size):
    images, targets = batch(64)
    _, mixed = mix(images, targets, jax.random.key(0), mixup=0.8, cutmix=0.0, group_size=group_size)
    partner = np.asarray(mixed) - np.diag(np.diag(mixed))
    np.testing.assert_array_equal(partner.argmax(1), np.arange(64)[::-1])


def test_a_groups_shares_are_distributed_as_timms():
    """The share of its own label that an image keeps, over 4,000 groups and as many of timm's."""
    images, targets = batch(2)
    settings = {"mixup": 0.8, "cutmix": 1.0, "probability": 0.9, "switch_probability": 0.3}
    theirs = Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.9, switch_prob=0.3, label_smoothing=0.0
    )
    theirs.num_classes = 2
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    draws = [
        float(theirs(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))[1][0, 0]) for _ in range(4000)
    ]
    many = jnp.broadcast_to(images, (4000, *images.shape)).reshape(-1, 16, 16, 3)
    labels = jnp.broadcast_to(targets, (4000, *targets.shape)).reshape(-1, 2)
    _, mixed = mix(many, labels, jax.random.key(0), group_size=2, **settings)
    ours = np.asarray(mixed)[::2, 0]
    # Equal to float32's rounding where nothing was mixed.
    assert scipy.stats.ks_2samp(np.round(ours, 5), np.round(draws, 5)).pvalue > 0.01


def test_groups_that_cannot_be_cut():
    def check(batch_size, group_size, accumulate=1, **augment):
        config = config_lib.base()
        config.augment.update(mix_group_size=group_size, **augment)
        config.data.batch_size = batch_size
        config.optim.accumulate = accumulate
        check_group_size(config)

    for mixing in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mix_token": True}):
        check(12, 4, **mixing)
        check(12, 128, **mixing)
        with pytest.raises(InputError, match="mix_group_size is 8, which does not divide the 12"):
            check(12, 8, **mixing)
        for size in (0, -1):
            with pytest.raises(InputError, match=f"mix_group_size is {size}; expected at least"):
                check(12, size, **mixing)
    check(12, 8)
    # MixUp mixes a batch, MixToken a micro-batch.
    check(24, 8, accumulate=2, mixup=0.8)
    with pytest.raises(InputError, match="does not divide the 12"):
        check(24, 8, accumulate=2, mix_token=True)
    with pytest.raises(InputError, match="does not divide the 36"):
        check(36, 24, accumulate=3, mix_token=True, cutmix=1.0)


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
    """Normalising, erasing, and mixing last."""
    images = jax.random.randint(jax.random.key(3), (6, 16, 16, 3), 0, 256).astype(jnp.uint8)
    plain = BatchTransform((0.5,) * 3, (0.25,) * 3)
    out, targets = plain(images, jnp.eye(6), jax.random.key(0))
    np.testing.assert_allclose(out, normalize(images, (0.5,) * 3, (0.25,) * 3))
    np.testing.assert_array_equal(targets, jnp.eye(6))

    policy = BatchTransform((0.5,) * 3, (0.25,) * 3, erase=0.5, mixup=0.8, mix_group_size=2)
    key = jax.random.key(0)
    erase_key, mix_key = jax.random.split(key)
    expected = erase(policy.normalize(images), jax.random.split(erase_key, 6), 0.5)
    expected = mix(expected, jnp.eye(6), mix_key, mixup=0.8, cutmix=0.0, group_size=2)
    for ours, theirs in zip(policy(images, jnp.eye(6), key), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_nothing_is_gathered_or_scattered():
    """On a TPU either is a loop over elements."""
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3, erase=0.5, mixup=0.8, cutmix=1.0)
    images, targets = jnp.zeros((4, 16, 16, 3), jnp.uint8), jnp.eye(4)
    program = jax.jit(transform).lower(images, targets, jax.random.key(0)).as_text()
    assert "stablehlo.concatenate" in program
    assert "gather" not in program
    assert "scatter" not in program


SIDE, COUNT = 112, 1000  # pixels and draws of what follows


def shares_kept(**settings):
    """The share that an image keeps of itself, in batches of two."""
    transform = BatchTransform((0.5,) * 3, (0.5,) * 3, **settings)
    images = jnp.zeros((2, SIDE, SIDE, 3), jnp.uint8)

    @jax.jit
    @jax.vmap
    def share(key):
        return transform(images, jnp.eye(2), key)[1][0, 0]

    return np.asarray(share(jax.random.split(jax.random.key(0), COUNT)))


def timms_shares(alpha):
    """Those that timm's CutMix leaves; a box's side is even in its early versions and here."""
    np.random.seed(0)  # noqa: NPY002 (timm's)
    drawn = np.random.default_rng(0).beta(alpha, alpha, COUNT)
    return [cutmix_bbox_and_lam((1, 3, SIDE, SIDE), lam)[1] for lam in drawn]


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixups_share_has_the_beta_distribution(alpha):
    assert kstest(shares_kept(mixup=alpha), beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmixs_share_is_distributed_as_timms(alpha):
    assert ks_2samp(shares_kept(cutmix=alpha), timms_shares(alpha)).pvalue > 1e-3


def test_mix_tokens_share_is_distributed_as_timms():
    """λ is uniform (LV-ViT), and each group has its own."""
    patches = jnp.zeros((COUNT, SIDE, SIDE, 1))
    boxes = jax.jit(lambda patches: mix_tokens(patches, jax.random.key(0), 1)[1])(patches)
    kept = 1 - np.asarray(boxes).mean((1, 2))
    assert ks_2samp(kept, timms_shares(1.0)).pvalue > 1e-3
