"""Names, fields and their errors; exact parameter counts and multiply-adds."""

import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models import create_model, evaluation_protocol, from_dict, list_models, model_config
from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.models.initializers import CountedRngs
from tests.helpers.timm_reference import timm

# Model: parameters and GMACs at 224, the same at 384 (where they are known).
COUNTS = {
    "deit_ti": (5_717_416, 1.25, 5_790_376, 4.68),
    "deit_s": (22_050_664, 4.60, 22_196_584, 15.49),
    "deit_b": (86_567_656, 17.56, 86_859_496, 55.48),
    "deit_ti_distilled": (5_910_800, 1.26, None, None),
    "deit_s_distilled": (22_436_432, 4.62, None, None),
    "deit_b_distilled": (87_338_192, 17.66, None, None),
    "lvvit_t": (8_534_720, 2.87, 8_625_920, 9.68),
    "lvvit_s": (26_151_824, 6.55, 26_297_744, 21.90),
    "lvvit_m": (55_830_544, 12.68, 56_025_104, 41.64),
    "lvvit_l": (150_021_968, 34.64, 150_313_808, 109.58),
    "spvit_s": (26_234_468, 6.55, 26_380_388, 21.92),
    "spvit_m": (55_952_992, 12.67, 56_147_552, 41.68),
    "spvit_l": (150_273_368, 34.55, 150_565_208, 109.59),
    "cait_xxs24": (11_956_264, 2.52, 12_029_224, 9.60),
    "cait_xxs36": (17_299_720, 3.76, 17_372_680, 14.31),
    "cait_xs24": (26_560_648, 5.39, 26_670_088, 19.24),
    "cait_s24": (46_916_200, 9.33, 47_062_120, 32.11),
    "cait_s36": (68_220_712, 13.90, 68_366_632, 47.91),
    "cait_m36": (270_929_512, 53.37, 271_221_352, 172.94),
    "swin_t": (28_288_354, 4.49, None, None),
    "swin_s": (49_606_258, 8.74, None, None),
    "swin_b": (87_768_224, 15.43, 87_903_584, 47.08),
    "swin_l": (196_532_476, 34.48, 196_735_516, 103.92),
}
MILLIONS = {"mait_xt": 6.3, "mait_t": 11, "mait_xs": 24.5, "mait_s": 43.3}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_macs_are_exact(name):
    params_224, macs_224, params_384, macs_384 = COUNTS[name]
    config = model_config(name)
    assert count_parameters(config) == params_224
    assert round(count_macs(config) / 1e9, 2) == macs_224
    if params_384:
        config = model_config(name, image_size=384)
        assert count_parameters(config) == params_384
        assert round(count_macs(config) / 1e9, 2) == macs_384


def test_spvit_m_with_the_ablations_18_layers():
    assert count_parameters(model_config("spvit_m", spatial_layers=18)) == 55_969_440
    config = model_config("spvit_m", spatial_layers=18, image_size=384)
    assert count_parameters(config) == 56_164_000


def test_cait_m48_at_448():
    config = model_config("cait_m48", image_size=448)
    assert count_parameters(config) == 356_460_520
    assert round(count_macs(config) / 1e9, 2) == 329.11


def test_spvit_l_as_its_authors_trained_it():
    """Without SP-SA, which an argument of their code left out, and yet with a late class token."""
    config = model_config("spvit_l", spatial_layers=0, class_token_layer=22)
    assert count_parameters(config) == 150_205_520


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("cait_s24", ((8, 8), (8, 1), (8, 0)), [8] * 8 + [1] * 8 + [0] * 8),
        ("cait_s24", "thirds", [8] * 8 + [1] * 8 + [0] * 8),
        ("swin_t", "thirds", [3, 3, 6, 6] + [1] * 4 + [0] * 4),
        ("swin_t", ((2, 3), (9, 2), (1, 24)), [3, 3] + [2] * 9 + [24]),
    ],
)
def test_masked_heads_are_an_argument_of_every_family(name, schedule, expected):
    config = model_config(name, masked_heads=schedule)
    assert list(map(len, config.masked_per_layer())) == expected
    assert count_parameters(config) == count_parameters(model_config(name))


SCHEDULES = {
    ((1, 2), (2, 1), (1, 0)): [(0, 1), (0,), (0,), ()],
    ((1, (0, 2)), (3, ())): [(0, 2), (), (), ()],
    ((2, (2, 1)), (2, 1)): [(1, 2), (1, 2), (0,), (0,)],
    ((0, 2), (1,), (), (2,)): [(0, 2), (1,), (), (2,)],
    (3, (0, 2), 1, 0): [(0, 1, 2), (0, 2), (0,), ()],
    (3, 1, 1, 0): [(0, 1, 2), (0,), (0,), ()],
    # Pairs of numbers alone are layers and heads, whatever else they might be.
    ((1, 2), (1, 0), (1, 2), (1, 0)): [(0, 1), (), (0, 1), ()],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_heads_are_numbers_of_them_or_named(schedule):
    config = model_config("mait_t", depth=4, masked_heads=schedule)
    assert config.masked_per_layer() == SCHEDULES[schedule]
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_survive_json():
    settings = {"image_size": (160, 256), "masked_heads": ((2, 3), (2, 0)), "mask_radius": (1, 2)}
    for config in (
        model_config("spvit_s", depth=4, spatial_layers=3, num_classes=10, **settings),
        model_config("cait_xxs24", depth=4, **settings),
        model_config("swin_t", depths=(2, 2), **settings),
    ):
        assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(
        InputError, match=r"settings of a model cannot be read from a\.pth: .*width"
    ):
        from_dict({"family": "ViTConfig", "width": 3}, "a.pth")


ABSURD = {
    "dim": (0, -384, 1 << 40, 384.0, True, None, "384", [384]),
    "depth": (0, 3000, 1e3),
    "mlp_ratio": (math.nan, math.inf, 0, -4.0, 1e9, "4"),
    "skip_lam": (0, 0.0, -1.0, math.nan),
    "mask_radius": ("wide", -1, [1], [1, 2, 3], [1, None], 1.5),
    "image_size": ("16x", "x", "16x20x3", 0, [224], "9999999", {}),
    "num_classes": (0, 10**9, "many"),
    "norm_eps": (0, math.nan),
    "layer_scale": (math.nan, "1e-5"),
    "qkv_bias": (1, "yes"),
    "masked_heads": ("halves", [[1]], [[12, 1.0]], 3, []),
    "prior_extent": (0, 14.0),
    "dtype": (32, None),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in ABSURD.items() for v in vs])
def test_settings_of_no_model_are_refused_wherever_they_come_from(field, value):
    """In a file, which may be anybody's, and from the user."""
    saved = model_config("deit_s").to_dict() | {field: value}
    with pytest.raises(InputError, match=f"cannot be read from a.pth: {field} ") as error:
        from_dict(saved, "a.pth")
    with pytest.raises(InputError) as told:
        model_config("deit_s", **{field: value})
    assert str(error.value).endswith(str(told.value))
    assert len(str(told.value)) < 200


@pytest.mark.parametrize("size", ["160x256", "160×256", [160, 256], (np.int64(160), 256)])
def test_an_image_size_may_be_a_text(size):
    config = create_model("deit_s", depth=1, dim=6, image_size=size).config
    assert config == model_config("deit_s", depth=1, dim=6, image_size=(160, 256))
    assert from_dict(json.loads(json.dumps(config.to_dict() | {"image_size": "160x256"}))) == config
    assert model_config("deit_s", image_size="384") == model_config("deit_s", image_size=384)


@pytest.mark.parametrize(
    ("name", "size", "crop"),
    [
        *[("deit_b", 384, 0.875), ("mait_s", 224, 0.875)],
        *[("spvit_s", 224, 0.9), ("spvit_s", 384, 0.9), ("spvit_m", 224, 1.0)],
        *[("spvit_l", 384, 1.0), ("lvvit_t", 224, 0.9), ("lvvit_l", 448, 1.0)],
        *[("cait_xxs24", 224, 1.0), ("swin_b", 224, 0.875), ("swin_b", 384, 1.0)],
    ],
)
def test_evaluation_crops_are_the_authors(name, size, crop):
    mode = "squash" if (name, size) == ("swin_b", 384) else "center"
    assert evaluation_protocol(name, (size, size)) == (crop, "bicubic", mode)


@pytest.mark.parametrize("name", MILLIONS)
def test_mait_has_the_papers_size_and_masks_cost_no_parameters(name):
    count = count_parameters(model_config(name))
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)
    assert count == count_parameters(model_config(name, masked_heads=None))


def test_layer_scale_adds_two_factors_per_channel_and_layer():
    plain, scaled = model_config("mait_s"), model_config("mait_s_layerscale")
    assert count_parameters(scaled) - count_parameters(plain) == 2 * 384 * 24


def test_default_mask_schedule_is_thirds():
    masked = model_config("mait_s").masked_per_layer()
    assert masked == [(0, 1, 2, 3, 4, 5)] * 8 + [(0,)] * 8 + [()] * 8
    masked = model_config("mait_t", depth=36).masked_per_layer()
    assert masked == [(0, 1, 2)] * 12 + [(0,)] * 12 + [()] * 12


def test_list_models_takes_a_pattern():
    assert list_models("spvit*") == ["spvit_l", "spvit_m", "spvit_s"]
    assert "mait_s_layerscale" in list_models()


@pytest.mark.parametrize("size", [224, (160, 256), 240, 336])
def test_any_grid_builds(size):
    small = {"depth": 2, "dim": 24, "num_heads": 3, "stem_width": 8, "spatial_layers": 1}
    config = model_config("spvit_s", image_size=size, **small)
    images = jax.ShapeDtypeStruct((2, *config.image_shape, 3), jnp.float32)
    logits = jax.eval_shape(lambda images: config.build(nnx.Rngs(0))(images), images)
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("spvit_s", {"depth": 2, "spatial_layers": 1}),
        ("cait_xxs24", {"depth": 1}),
        ("swin_t", {"depths": (1, 1)}),
    ],
)
def test_keys_counted_by_python_give_the_weights_that_flax_gives(name, small):
    config = model_config(name, image_size=32, dim=12, num_heads=3, **small)

    @functools.partial(jax.jit, static_argnums=0)
    def leaves(kind):
        return jax.tree.leaves(nnx.state(config.build(kind(jax.random.key(3)))))

    ours, theirs = leaves(CountedRngs), leaves(nnx.Rngs)
    assert len(ours) == len(theirs) > 20
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_same_seed_same_weights():
    def leaves(seed):
        model = create_model("deit_ti", depth=1, image_size=32, rngs=nnx.Rngs(seed))
        return jax.tree.leaves(nnx.state(model))

    same = [bool((a == b).all()) for a, b in zip(leaves(1), leaves(1), strict=True)]
    other = [bool((a == b).all()) for a, b in zip(leaves(1), leaves(2), strict=True)]
    assert all(same)
    assert not all(other)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("spvit_x", {}, "did you mean 'spvit_"),
        ("spvit_s", {"spatial_layer": 3}, "did you mean 'spatial_layers'"),
        ("spvit_s", {"spatial_layers": 16}, "at most 15"),
        ("spvit_s", {"spatial_layers": -1}, "at most 15"),
        ("deit_s", {"image_size": 225}, "225×225 is not a multiple of patch_size 16"),
        ("deit_s", {"image_size": (224, 230)}, "224×230"),
        ("lvvit_s", {"patch_size": 7}, "even"),
        ("deit_s", {"num_heads": 5}, "dim 384 is not a multiple of num_heads 5"),
        ("mait_s", {"masked_heads": ((8, 6), (8, 1))}, "covers 16 layers, the model has 24"),
        ("mait_s", {"masked_heads": ((8, 7), (16, 1))}, "asks for 7 masked heads"),
        ("mait_s", {"masked_heads": "halves"}, "'thirds'"),
        ("mait_s", {"depth": 2, "masked_heads": ((0, 6), 0)}, "names head 6 in layer 0, which has"),
        ("mait_s", {"depth": 2, "masked_heads": ((3, 3), ())}, "names head 3 twice in layer 0"),
        ("mait_s", {"depth": 1, "masked_heads": ((-1,),)}, "names head -1 in layer 0, which has"),
        ("mait_s", {"depth": 2, "masked_heads": ((0,),)}, "covers 1 layers, the model has 2"),
        ("mait_s", {"depth": 2, "masked_heads": ((0, 2), (0, 1))}, "one layer are written (1, (0"),
        ("mait_s", {"depth": 2, "masked_heads": ((1, (0, 2)), 1)}, "or pairs (layers, heads"),
        ("mait_s", {"depth": 1, "masked_heads": ((-1, 2), (2, 1))}, "negative number of layers"),
        ("mait_s", {"mask_kind": "fuzzy"}, "'soft' or 'hard'"),
        ("cait_s24", {"masked_heads": ((12, 9), (12, 0))}, "asks for 9 masked heads in layer 0"),
        ("swin_t", {"masked_heads": ((12, 4),)}, "asks for 4 masked heads in layer 0, which has 3"),
        ("swin_t", {"depths": (2, 0, 2)}, "expected whole numbers of at least 1"),
        ("swin_t", {"window": 0}, "window is 0; expected a whole number or None of at least 1"),
        ("swin_t", {"image_size": 226}, "226×226 is not a multiple of patch_size 4"),
        ("swin_t", {"stem_width": 2}, "has no field 'stem_width'"),
        ("spvit_s", {"class_token_layer": 16}, "at most 15"),
        ("deit_s", {"drop_path": 1.0}, "rate in"),
        ("deit_s", {"dtype": "float16"}, "expected float32, bfloat16"),
    ],
)
def test_wrong_settings_are_one_clear_error(name, overrides, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        create_model(name, **overrides)


def test_models_run_without_tensorflow():
    """In an interpreter in which importing TensorFlow, or the data code, is an error."""
    program = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
sys.modules["spvit_jax.data"] = None
import jax, jax.numpy as jnp
from spvit_jax.models import create_model
small = dict(image_size=32, depth=2, dim=24, num_heads=3)
def logits(images):
    return create_model("spvit_s", spatial_layers=1, **small)(images)
print(jax.jit(logits)(jnp.zeros((1, 32, 32, 3))).shape)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "(1, 1000)\n", result.stderr


def test_layer_scale_of_each_cait_is_timms():
    for name in list_models("cait_*"):
        (theirs,) = timm.list_models(f"{name}_*")[:1]
        block = timm.create_model(theirs, depth=1, embed_dim=48, num_classes=1).blocks[0]
        assert model_config(name).layer_scale == pytest.approx(block.gamma_1[0].item())


@pytest.mark.parametrize(
    ("pattern", "skip_lam", "drop_path"),
    [
        ("*vit_s", 2, 0.1),
        ("*vit_m", 2, 0.2),
        ("*vit_l", 3, 0.3),
        ("lvvit_t", 1, 0.1),
    ],
)
def test_branches_of_lvvit_and_spvit_are_scaled_and_dropped_as_their_authors_do(
    pattern, skip_lam, drop_path
):
    for name in list_models(pattern):
        config = model_config(name)
        assert (config.skip_lam, config.drop_path) == (skip_lam, drop_path)


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("deit_s_distilled", {"depth": 1, "remat": True}, ("patch_embed/proj", "dist_head")),
        ("spvit_s", {"depth": 2, "stem_width": 8, "spatial_layers": 1}, ("blocks/0/attn/prior",)),
        ("mait_t", {"depth": 3}, ("blocks/2/mlp/fc2",)),
        ("cait_xxs24", {"depth": 1, "class_layers": 1}, ("class_blocks/0/attn/proj",)),
        ("swin_t", {"depths": (1, 1), "window": 4}, ("blocks/1/attn/position", "merges/0")),
    ],
)
def test_a_model_can_be_tabulated_and_used_afterwards(name, settings, rows):
    """flax runs each method under jit while it tabulates, and leaves them so if one fails."""
    small = {"image_size": 32, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}
    config = model_config(name, **small, **settings)
    model, images = config.build(CountedRngs(0)), jnp.ones((2, 32, 32, 3))
    classify = jax.jit(lambda model, images: model(images))
    before = classify(model, images)
    console = {"force_terminal": False, "width": 300}
    lines = nnx.tabulate(model, images, console_kwargs=console).splitlines()
    paths = {cells[1].strip() for line in lines if len(cells := line.split("│")) > 1}
    assert paths.issuperset(rows)
    np.testing.assert_array_equal(classify(model, images), before)
    config.abstract()  # another of the kind can be made
