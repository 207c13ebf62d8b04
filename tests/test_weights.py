"""Weights from wherever they are: what is found, what is new, and what is said about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from spvit_jax import weights
from spvit_jax.errors import InputError
from spvit_jax.interop import files, to_theirs, to_torch
from spvit_jax.interop.tensors import as_arrays
from spvit_jax.models import create_model, model_config
from spvit_jax.models.naming import arrays_of, shapes_of
from spvit_jax.training import sharding
from spvit_jax.weights import load_torch
from tests.helpers.photographs import photographs
from tests.helpers.torch_models import TorchViT, randomise
from tests.helpers.variables import run

VIT = {"depth": 3, "dim": 24, "num_heads": 3, "image_size": 48, "num_classes": 7}
SPVIT = VIT | {"depth": 5, "stem_width": 8}


def same_arrays(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), name)


def small_model(**overrides):
    return model_config("deit_ti", **(VIT | overrides)).build(nnx.Rngs(0))


def test_load_torch_puts_weights_into_a_model():
    config = model_config("deit_ti", **VIT)
    module = randomise(TorchViT(config))
    model = small_model()
    load_torch(model, {f"module.{name}": v for name, v in module.state_dict().items()})
    same_arrays(to_torch(model), as_arrays(module.state_dict()))
    logits = jax.jit(lambda m, x: m(x))(model, jnp.asarray(photographs(48), jnp.float32))
    assert logits.shape == (2, 7)
    larger = small_model(image_size=(48, 80))
    load_torch(larger, module.state_dict())
    assert larger.pos_embed.shape == (1, 16, 24)


def test_load_torch_leaves_the_model_alone_when_it_does_not_fit():
    module = TorchViT(model_config("deit_ti", **VIT))
    model = small_model(num_classes=9)
    before = jax.tree.map(jnp.copy, arrays_of(model))
    with pytest.raises(InputError, match="a head of 7 classes, and 9 are asked for"):
        load_torch(model, module.state_dict())
    deeper = small_model(depth=4)
    with pytest.raises(InputError, match=r"Missing: blocks\.3\.norm1\.weight"):
        load_torch(deeper, module.state_dict())
    same_arrays(arrays_of(model), before)
    load_torch(model, module.state_dict(), new_head=True)
    assert arrays_of(model)["head/kernel"].shape == (24, 9)


@pytest.mark.parametrize("spatial_layers", [4, 0])
def test_load_torch_reads_the_kinds_of_layers(spatial_layers, caplog):
    """As evaluation does; M has 10 layers of SP-SA here, and 18 in the paper's ablation."""
    source = model_config("spvit_m", **SPVIT, spatial_layers=spatial_layers)
    module = randomise(TorchViT(source)).eval()
    model = create_model("spvit_m", **SPVIT, spatial_layers=2)
    load_torch(model, {"net": module.state_dict()})
    assert (model.config.spatial_layers, model.config.class_token_block) == (
        spatial_layers,
        source.class_token_block,
    )
    assert caplog.messages == [
        "note: the state dict: took net",
        "note: the kinds of the model's layers are now those of the state dict",
    ]
    images = photographs(48)
    with torch.no_grad():
        theirs = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float()).numpy()
    ours = jax.jit(lambda m, x: m(x))(model, jnp.asarray(images, jnp.float32))
    assert abs(np.asarray(ours) - theirs).max() <= 3e-5 * theirs.std()


def test_load_torch_warns_as_evaluation_does(tmp_path, caplog):
    trained = model_config("spvit_s", **SPVIT, spatial_layers=2, skip_lam=3.0)
    path = tmp_path / "a.safetensors"
    arrays = {k: np.ones(leaf.shape, np.float32) for k, leaf in shapes_of(trained).items()}
    files.write(path, to_theirs(arrays, trained), trained.to_dict())
    load_torch(create_model("spvit_s", **SPVIT, spatial_layers=2), path)
    words = f"warning: {path} was trained with skip_lam 3.0, and 2.0 is asked for"
    assert words in caplog.messages


def without(state_dict, *heads):
    return {k: v for k, v in state_dict.items() if not k.startswith(heads)}


@pytest.mark.parametrize(
    ("name", "settings", "heads", "ours"),
    [
        ("deit_ti", VIT, ("head.",), "head"),
        ("deit_ti_distilled", VIT, ("head", "head_dist"), "dist_head, head"),
        ("lvvit_s", SPVIT, ("aux_head",), "dense_head"),
    ],
)
def test_missing_heads_are_new_where_that_is_asked_for(name, settings, heads, ours, caplog):
    config = model_config(name, **settings)
    whole = as_arrays(randomise(TorchViT(config)).state_dict())
    backbone = without(whole, *heads)
    found = weights.find(backbone, config)
    with pytest.raises(InputError, match=f"lacks the weights of {ours}; to begin with a new head"):
        found.check(found.config)
    found.check(found.config, new_head=True)
    assert caplog.messages == [f"note: the state dict lacks {ours}: new"]
    variables = found.load(found.config, sharding.make_mesh(-1, 1))
    loaded = weights.arrays_of(variables)
    assert loaded.keys() == shapes_of(found.config).keys()
    complete = weights.find(whole, config).read(sharding.make_mesh(-1, 1), "replicated")
    for array_name, array in loaded.items():
        head = array_name.partition("/")[0]
        if head not in ours.split(", "):
            np.testing.assert_array_equal(array, complete[array_name], array_name)
        elif array_name.endswith("kernel"):
            assert 0.01 < float(jnp.std(array)) < 0.04
    logits = run(variables, jnp.zeros((1, *found.config.image_shape, 3)))
    assert logits.shape == (1, found.config.num_classes)


def test_half_a_head_is_another_model():
    config = model_config("deit_ti", **VIT)
    state_dict = without(as_arrays(TorchViT(config).state_dict()), "head.bias")
    with pytest.raises(InputError, match=r"Missing: head\.bias"):
        weights.find(state_dict, config)


def test_names_from_a_file_are_printed_escaped_and_short():
    config = model_config("deit_ti", **VIT)
    names = {"\x1b[31mred\n\u202e": torch.ones(1), 1000 * "x": torch.ones(1)}
    with pytest.raises(InputError) as error:
        weights.find(TorchViT(config).state_dict() | names, config)
    assert str(error.value).isprintable()
    assert r"Unexpected: \x1b[31mred\n\u202e, xxx" in str(error.value)
    assert len(str(error.value)) < 300


def test_a_grid_that_the_file_does_not_show_is_said(caplog):
    config = model_config("deit_ti", **(VIT | {"image_size": (64, 144)}))
    found = weights.find(TorchViT(config).state_dict(), config)
    assert found.config.grid == (4, 9)
    assert caplog.messages == [
        "note: the state dict does not say whether its 36 patches are 4×9, as in the model, or 6×6"
    ]


def test_an_own_file_keeps_its_grid(tmp_path, caplog):
    config = model_config("deit_ti", **(VIT | {"image_size": (64, 144)}))
    path = tmp_path / "a.safetensors"
    arrays = {k: np.ones(leaf.shape, np.float32) for k, leaf in shapes_of(config).items()}
    files.write(path, to_theirs(arrays, config), config.to_dict())
    assert weights.find(path, None).config == config
    assert weights.find(path, model_config("deit_ti", **VIT)).config == config
    assert not any("does not say whether" in message for message in caplog.messages)


def test_a_workdir_goes_before_what_was_exported_into_it(tmp_path):
    config = model_config("deit_ti", **VIT)
    arrays = {k: np.ones(leaf.shape, np.float32) for k, leaf in shapes_of(config).items()}
    files.write(tmp_path / "model.safetensors", to_theirs(arrays, config), config.to_dict())
    assert weights.find(tmp_path, None).where.endswith(tmp_path.name)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(InputError, match="checkpoint"):
        weights.find(tmp_path, None)
