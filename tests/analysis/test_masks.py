"""MaiT's rule for masked heads."""

import shlex
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from spvit_jax import config as config_lib
from spvit_jax.analysis.masks import as_text, check_masks_matter, choose_masks
from spvit_jax.errors import InputError
from spvit_jax.models import model_config
from tests.helpers import REPOSITORY

# Of six heads: all local but one; one is; near a half, and none the most; and two that are not.
SCORES = [
    np.array([0.9, 1.0, 0.95, 0.99, 1.0, 0.1]),
    np.array([1.0, 0.4, 0.3, 0.3, 0.2, 0.2]),
    np.array([0.2, 0.3, 0.74, 0.1, 0.1, 0.1]),
    np.array([0.2, 0.24, 0.2, 0.2, 0.2, 0.2]),
    np.array([0.05, 0.05, 0.1, 0.05, 0.05, 0.05]),
]


def test_the_rule():
    config = model_config("deit_s", image_size=64, depth=5)
    schedule = choose_masks(config, SCORES)
    assert schedule == ((1, (0, 1, 2, 3, 4)), (1, (0,)), (1, (2,)), (2, ()))
    found = model_config("deit_s", image_size=64, depth=5, masked_heads=schedule)
    assert found.masked_per_layer() == [(0, 1, 2, 3, 4), (0,), (2,), (), ()]


def test_two_heads_of_every_layer_are_no_pairs_of_numbers():
    """((0, 1), (0, 1)) would be no layers with one head each; runs of layers say what is meant."""
    settings = {"image_size": 64, "depth": 2, "num_heads": 2}
    schedule = choose_masks(model_config("deit_s", **settings), [np.ones(2)] * 2)
    found = model_config("deit_s", **settings, masked_heads=schedule)
    assert found.masked_per_layer() == [(0, 1), (0, 1)]


def test_what_is_printed_is_an_argument(monkeypatch):
    """Through the shell and the flag, back to a model's settings."""
    schedule = choose_masks(
        model_config("mait_t", image_size=12, patch_size=2, depth=4, masked_heads=None),
        [np.ones(3), np.array([0.2, 0.9, 0.3]), np.zeros(3), np.zeros(3)],
    )
    (argument,) = shlex.split(as_text(schedule))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    recipe = f"--config={REPOSITORY / 'configs' / 'digits.py'}:model=mait"
    monkeypatch.setattr(sys, "argv", ["train", recipe, argument])  # where overrides are looked for
    values(sys.argv)
    model = config_lib.model_settings(values.config, num_classes=10)
    assert model.masked_per_layer() == [(0, 1, 2), (1,), (), ()]


def test_masks_that_would_change_nothing():
    """In the last stage of a pyramid all patches are near; on one patch there is no choice."""
    pyramid = model_config("mait_pyramid_t", image_size=32, depths=(1, 1, 1), dim=12, num_heads=3)
    assert [stage[0] for stage in pyramid.stages()] == [(8, 8), (4, 4), (2, 2)]
    schedule = choose_masks(pyramid, [np.ones(heads) for heads in (3, 6, 12)])
    assert schedule == ((1, (0, 1, 2)), (1, (0, 1, 2, 3, 4, 5)), (1, ()))
    # A window of Swin is what its heads can see.
    swin = model_config("swin_t", image_size=32, depths=(1, 1), window=2)
    assert choose_masks(swin, [np.ones(3), np.ones(6)]) is None
    with pytest.raises(InputError, match=r"3×3 patches spans all that heads can see of the 8×8"):
        check_masks_matter(swin)
    with pytest.raises(InputError, match=r"1×1 patches, in every layer.*a larger image_size"):
        check_masks_matter(model_config("deit_ti", image_size=16, depth=1))
    check_masks_matter(pyramid)
