"""State dicts of PyTorch in and out: bit by bit, and whatever kind of layers they have."""

import dataclasses

import numpy as np
import pytest

from spvit_jax.errors import InputError
from spvit_jax.interop import DIALECTS, to_ours, to_theirs
from spvit_jax.interop.files import as_arrays
from spvit_jax.models import model_config
from spvit_jax.models.naming import shapes_of
from tests.helpers.torch_models import TorchViT, build_timm, randomise

VIT = {"depth": 3, "dim": 24, "num_heads": 3, "image_size": 48, "num_classes": 7}
STEM = VIT | {"stem_width": 8}
TIMM = {"img_size": 48, "num_classes": 7, "depth": 3, "embed_dim": 24, "num_heads": 3}
SWIN = {"img_size": 64, "num_classes": 7, "depths": (2, 2), "embed_dim": 24, "num_heads": (3, 6)}


def cases():
    """A model of each family: its configuration, and a PyTorch module of it."""
    for name, settings in (
        ("spvit_s", STEM | {"spatial_layers": 2}),
        ("lvvit_s", STEM),
        ("mait_s", VIT),
    ):
        config = model_config(name, **settings)
        yield name, config, TorchViT(config)
    layer_scale = {"init_values": 0.1}
    yield "deit_s", model_config("deit_s", **VIT), build_timm("deit_small_patch16_224", **TIMM)
    yield (
        "deit_s_distilled",
        model_config("deit_s_distilled", **VIT),
        build_timm("deit_small_distilled_patch16_224", **TIMM),
    )
    yield (
        "mait_s_layerscale",
        model_config("mait_s_layerscale", **VIT),
        build_timm("vit_small_patch16_224", **TIMM, **layer_scale),
    )
    yield "cait_s24", model_config("cait_s24", **VIT), build_timm("cait_xxs24_224", **TIMM)
    swin = {"image_size": 64, "num_classes": 7, "depths": (2, 2), "dim": 24, "window": 4}
    yield (
        "swin_t",
        model_config("swin_t", **swin),
        build_timm("swin_tiny_patch4_window7_224", **SWIN, window_size=4),
    )


CASES = {name: (config, module) for name, config, module in cases()}


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_identical(name):
    config, module = CASES[name]
    state_dict = as_arrays(randomise(module).state_dict())
    dialect = "timm" if name in ("mait_s_layerscale", "swin_t") else "authors"
    found, arrays = to_ours(state_dict, config)
    assert found == config
    assert arrays.keys() == shapes_of(config).keys()
    same(to_theirs(arrays, config, dialect), state_dict)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_both_dialects_are_read(name, dialect):
    config, module = CASES[name]
    _, arrays = to_ours(as_arrays(randomise(module).state_dict()), config)
    _, again = to_ours(to_theirs(arrays, config, dialect), config)
    same(again, arrays)


def test_swins_authors_merge_at_the_end_of_a_stage_and_save_buffers():
    config, module = CASES["swin_t"]
    _, arrays = to_ours(as_arrays(randomise(module).state_dict()), config)
    theirs = to_theirs(arrays, config, "authors")
    assert theirs["layers.0.downsample.reduction.weight"].shape == (48, 96)
    assert theirs["head.weight"].shape == (7, 48)
    buffers = {
        "layers.0.blocks.1.attn_mask": np.zeros((16, 16, 16)),
        "layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64),
    }
    same(to_ours(theirs | buffers, config)[1], arrays)


@pytest.mark.parametrize(
    "name", ["deit_ti_distilled", "mait_s_layerscale", "spvit_s", "lvvit_t", "cait_xxs24", "swin_t"]
)
def test_the_tables_name_every_array_of_every_model(name):
    config = model_config(name)
    arrays = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in shapes_of(config).items()}
    for dialect in DIALECTS:
        theirs = to_theirs(arrays, config, dialect)
        counters = [name for name in theirs if name.endswith("num_batches_tracked")]
        size = sum(array.size for array in theirs.values()) - len(counters)
        assert size == sum(leaf.size for leaf in shapes_of(config).values())


@pytest.mark.parametrize(
    ("settings", "spatial_layers", "late"),
    [
        ({"spatial_layers": 1}, 1, 1),
        ({"spatial_layers": 4}, 4, 4),
        ({"spatial_layers": 0}, 0, 0),
        ({"spatial_layers": 0, "class_token_layer": 3}, 0, 3),
    ],
)
def test_kinds_of_layers_are_read_from_the_names(settings, spatial_layers, late):
    """Whatever the number of SP-SA layers, also that of L, whose authors left it out."""
    source = model_config("spvit_l", **(STEM | {"depth": 5} | settings))
    like = model_config("spvit_l", **(STEM | {"depth": 5, "spatial_layers": 3}))
    found, arrays = to_ours(as_arrays(randomise(TorchViT(source)).state_dict()), like)
    assert (found.spatial_layers, found.class_token_block) == (spatial_layers, late)
    assert arrays.keys() == shapes_of(source).keys()


@pytest.mark.parametrize("name", CASES)
def test_classes_and_resolution_are_read_from_the_shapes(name):
    config, module = CASES[name]
    other = {"image_size": 384, "num_classes": 1000} | (
        {"window": None} if name == "swin_t" else {}
    )
    found, _ = to_ours(as_arrays(module.state_dict()), dataclasses.replace(config, **other))
    assert found.num_classes == 7
    # A window of 4 is that of 128 pixels by Swin's rule, whatever they were.
    assert found.image_shape == ((128, 128) if name == "swin_t" else (48, 48))


def test_all_differences_are_shown_together():
    config, module = CASES["deit_s"]
    state_dict = as_arrays(module.state_dict())
    del state_dict["norm.bias"]
    state_dict["blocks.1.attn.qkv.weight"] = np.zeros((70, 24), np.float32)
    state_dict["fc.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as error:
        to_ours(state_dict, config, "some.pth")
    assert str(error.value) == (
        "some.pth is of another model. Missing: norm.bias. Unexpected: fc.weight. "
        "Wrong shape: blocks.1.attn.qkv.weight 70×24 instead of 72×24."
    )


def test_a_grid_that_is_neither_square_nor_the_models_is_asked_for():
    source = model_config("deit_s", **(VIT | {"image_size": (48, 80)}))
    state_dict = as_arrays(TorchViT(source).state_dict())
    with pytest.raises(InputError, match=r"of 16 rows, which fits neither a square .* 3×3"):
        to_ours(state_dict, model_config("deit_s", **VIT))
    assert to_ours(state_dict, source)[0] == source


def test_weights_are_finite_floating_point_numbers():
    config, module = CASES["deit_s"]
    state_dict = as_arrays(module.state_dict())
    broken = state_dict["head.weight"].copy()
    broken[0, :3], broken[1, 1] = np.nan, -np.inf
    large = np.full(7, 1e300)  # infinite as soon as it is float32
    spoilt = state_dict | {"head.weight": broken, "head.bias": large}
    words = r"has 11 values that are NaN or infinite: head\.\w+ \d, head\.\w+ \d;"
    with pytest.raises(InputError, match=words):
        to_ours(spoilt, config)
    for dtype in (np.int64, np.uint8, np.bool_, np.complex64):
        other = state_dict | {"norm.bias": np.ones(24, dtype)}
        with pytest.raises(InputError, match=f"floating-point numbers: norm.bias {dtype.__name__}"):
            to_ours(other, config)


# Grids that are no squares and have a square's number of patches: 4×9 is 6×6, 2×8 is 4×4.
ODD = [
    ("deit_s", {"image_size": (64, 144)}),
    ("deit_s_distilled", {"image_size": (144, 64)}),
    ("mait_s_layerscale", {"image_size": (32, 128)}),
    ("lvvit_s", STEM | {"image_size": (64, 144)}),
    ("spvit_s", STEM | {"image_size": (144, 64), "spatial_layers": 2}),
    ("spvit_l", STEM | {"image_size": (64, 144), "spatial_layers": 0, "class_token_layer": 2}),
    ("cait_s24", {"image_size": (64, 144)}),
]


@pytest.mark.parametrize(("name", "settings"), ODD)
def test_a_grid_that_fits_is_kept(name, settings):
    """In and out again, whether or not its number of patches is a square's."""
    config = model_config(name, **(VIT | settings))
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes_of(config).items()
    }
    for dialect in DIALECTS:
        found, again = to_ours(to_theirs(arrays, config, dialect), config)
        assert found == config
        same(again, arrays)


def test_swins_window_that_fits_is_kept():
    swin = {"num_classes": 7, "depths": (2, 2), "dim": 24, "window": 5}
    config = model_config("swin_t", image_size=(4, 20), **swin)
    assert shapes_of(config)["blocks/0/attn/position/table"].shape[1:] == (1, 9)  # or 3×3
    arrays = {k: np.ones(leaf.shape, np.float32) for k, leaf in shapes_of(config).items()}
    table = arrays["blocks/0/attn/position/table"]
    table[:] = np.arange(table.size).reshape(table.shape)
    found, again = to_ours(to_theirs(arrays, config), config)
    assert found == config
    same(again, arrays)


def test_the_kind_of_layers_is_read_on_a_grid_that_is_no_square():
    """L without SP-SA, whose class token has no position, told from one whose token has."""
    settings = STEM | {"image_size": (64, 80), "depth": 5}
    like = model_config("spvit_l", **(settings | {"spatial_layers": 3}))
    for late in (0, 3):
        source = dataclasses.replace(like, spatial_layers=0, class_token_layer=late)
        found, _ = to_ours(as_arrays(TorchViT(source).state_dict()), like)
        assert (found.class_token_block, found.grid) == (late, (4, 5))
