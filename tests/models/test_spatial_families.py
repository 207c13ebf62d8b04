"""Priors, masks and distillation in the families that are not isotropic ViTs, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.errors import InputError
from spvit_jax.interop import to_ours
from spvit_jax.interop.translate import to_theirs
from spvit_jax.models import model_config
from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.models.naming import arrays_of, named_leaves
from spvit_jax.training.sharding import make_mesh, state_shardings
from tests.helpers import numpy_models
from tests.helpers.variables import random_variables, run

SMALL = {"dim": 12, "num_heads": 3, "num_classes": 5, "patch_size": 4, "dtype": "float64"}
CASES = {
    "cait_with_prior_masks_and_distillation": (
        "cait_xxs24",
        {"image_size": (20, 28), "depth": 3, "spatial_layers": 2, "distilled": True}
        | {"masked_heads": ((0, 2), (1,), ()), "prior_extent": 14, "layer_scale": 0.3},
    ),
    "pyramid": ("mait_pyramid_t", {"image_size": (32, 48), "depths": (1, 1, 2)}),
    "pyramid_local_with_prior": (
        "mait_pyramid_t",
        {"image_size": (32, 48), "depths": (1, 2), "spatial_layers": 2, "attention": "local"}
        | {"masked_heads": ((0, 2), 6, (1, 4)), "mask_radius": (1, 2), "distilled": True}
        | {"layer_scale": 0.3, "pos_conv": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(case):
    name, settings = CASES[case]
    read = numpy_models.cait_logits if "cait" in case else numpy_models.pyramid_logits
    with jax.enable_x64(True):
        variables = random_variables(name, **SMALL, **settings)
        config = variables.model().config
        images = np.random.default_rng(1).normal(size=(2, *config.image_shape, 3))
        ours = np.asarray(run(variables, jnp.asarray(images)))
        params = {k: np.asarray(v) for k, v in named_leaves(variables.params).items()}
        theirs = read(images, params, {}, config)
    assert abs(ours - theirs).max() / theirs.std() < 1e-9


# Parameters at 224 and at 384, GMACs at 224.
PYRAMIDS = {
    "mait_pyramid_t": (28_566_088, 29_149_768, 4.47),
    "mait_pyramid_s": (49_859_656, 50_443_336, 8.82),
    "mait_pyramid_b": (88_106_088, 88_884_328, 15.53),
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_parameters_and_macs_of_the_pyramids_are_exact(name):
    small, large = model_config(name), model_config(name, image_size=384)
    counts = *map(count_parameters, (small, large)), round(count_macs(small) / 1e9, 2)
    assert counts == PYRAMIDS[name]


NEW_ARRAYS = {
    "cait_xxs24": {"depth": 2, "spatial_layers": 1, "distilled": True},
    "swin_t": {"depths": (1, 1), "spatial_layers": 1},
    "deit_ti": {"depth": 2, "position_bias_layers": 1},
    "mait_pyramid_t": {"depths": (1, 1), "spatial_layers": 1, "distilled": True}
    | {"pos_conv": True, "layer_scale": 0.3},
}


@pytest.mark.parametrize("name", NEW_ARRAYS)
def test_every_array_has_a_name_for_pytorch_and_a_sharding_rule(name):
    small = SMALL | {"image_size": 32, "dtype": "float32"}
    variables = random_variables(name, **small, **NEW_ARRAYS[name])
    model = variables.model()
    arrays = {k: np.asarray(v) for k, v in arrays_of(model).items()}
    found, back = to_ours(to_theirs(arrays, model.config), model.config)
    assert found == model.config
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path], array)
    state_shardings(variables, make_mesh(1, 1, jax.devices()[:1]), "fsdp")


def test_a_pyramid_has_swins_parameters_but_for_positions():
    swin, pyramid = model_config("swin_t"), model_config("mait_pyramid_t")
    biases = 13 * 13 * sum(swin.heads_per_layer())
    assert count_parameters(pyramid) - 56 * 56 * 96 == count_parameters(swin) - biases


def test_heads_of_a_pyramid_are_masked_where_the_grid_is_large():
    masked = model_config("mait_pyramid_t").masked_per_layer()
    assert list(map(len, masked)) == [3, 3, 6, 6, *[6] * 6, 12, 12]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("mait_pyramid_t", {"image_size": 240}, "240×240 is not a multiple of 32, which patch"),
        ("mait_pyramid_t", {"image_size": (224, 240)}, "choose 224×224 or 224×256"),
        ("mait_pyramid_t", {"spatial_layers": 13}, "the model has 12 layers"),
        ("swin_t", {"spatial_layers": -1}, "the model has 12 layers"),
        ("cait_s24", {"spatial_layers": 25}, "the model has 24 layers of patches"),
        ("deit_s", {"position_bias_layers": 13}, "position_bias_layers is 13; the model has 12"),
        (
            "mait_s",
            {"position_bias_layers": 1, "attention": "local"},
            "'local', which knows no learned bias of masked heads",
        ),
        ("deit_s", {"masked_heads": "stages"}, "masked_heads is 'stages', and the model has none"),
    ],
)
def test_wrong_settings_are_one_clear_error(name, settings, words):
    with pytest.raises(InputError, match=words):
        model_config(name, **settings)
