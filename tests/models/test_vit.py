"""The models against an independent NumPy float64 implementation, weights far from initial."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models import layers as layers_lib
from spvit_jax.models import stem as stem_lib
from spvit_jax.models.naming import named_leaves
from tests.helpers import numpy_models
from tests.helpers.variables import random_variables, run

SMALL = {"image_size": (40, 64), "patch_size": 4, "dim": 24, "num_heads": 3, "num_classes": 7}
IMAGES = jax.random.normal(jax.random.key(1), (2, 40, 64, 3))

CASES = {
    "deit": ("deit_ti", {"depth": 3}),
    "deit_distilled": ("deit_ti_distilled", {"depth": 3}),
    "lvvit": ("lvvit_s", {"depth": 3, "stem_width": 8}),
    "spvit": ("spvit_s", {"depth": 4, "stem_width": 8, "spatial_layers": 3}),
    "spvit_no_prior": ("spvit_s", {"depth": 2, "stem_width": 8, "spatial_layers": 0}),
    "spvit_extent": (
        "spvit_s",
        {"depth": 2, "stem_width": 8, "spatial_layers": 1, "prior_extent": 14},
    ),
    "spvit_l_as_its_authors_trained_it": (
        "spvit_s",
        {"depth": 3, "stem_width": 8, "spatial_layers": 0, "class_token_layer": 2},
    ),
    "spvit_class_token_from_the_start": (
        "spvit_s",
        {"depth": 3, "stem_width": 8, "spatial_layers": 2, "class_token_layer": 0},
    ),
    "mait_soft": ("mait_t", {"depth": 3, "attention": "xla"}),
    "mait_soft_local": ("mait_t", {"depth": 3, "attention": "local"}),
    "mait_hard_3x5": (
        "mait_t",
        {"depth": 4, "masked_heads": ((1, 3), (2, 1), (1, 0)), "mask_kind": "hard"}
        | {"attention": "xla"}
        | {"mask_radius": (1, 2)},
    ),
    "mait_of_chosen_heads_local": (
        "mait_t",
        {"depth": 3, "masked_heads": ((0, 2), (1,), ()), "mask_radius": (2, 1)}
        | {"attention": "local", "mask_kind": "hard", "qkv_bias": False, "distilled": True},
    ),
    "masked_spvit_local": (
        "spvit_s",
        {"depth": 3, "stem_width": 8, "spatial_layers": 2, "masked_heads": (2, (0, 2), (1,))}
        | {"attention": "local", "mask_radius": (1, 2)},
    ),
    "deit_position_bias": ("deit_ti", {"depth": 4, "position_bias_layers": 2}),
    "masked_spvit_position_bias": (
        "spvit_s",
        {"depth": 3, "stem_width": 8, "spatial_layers": 2, "masked_heads": ((3, 2),)}
        | {"position_bias_layers": 3, "distilled": True},
    ),
    "mait_layerscale": ("mait_s_layerscale", {"depth": 3}),
    "masked_scaled_distilled_spvit": (
        "spvit_s",
        {"depth": 3, "stem_width": 8, "spatial_layers": 2, "masked_heads": ((3, 2),)}
        | {"layer_scale": 0.1, "distilled": True, "attention": "xla"},
    ),
}


def largest_difference(name, overrides):
    """Between the model's logits and the reference's, over the logits' standard deviation."""
    with jax.enable_x64(True):
        variables = random_variables(name, dtype="float64", **(SMALL | overrides))
        images = np.random.default_rng(1).normal(size=(2, *SMALL["image_size"], 3))
        ours = np.asarray(run(variables, jnp.asarray(images)))
        params = {k: np.asarray(v) for k, v in named_leaves(variables.params).items()}
        stats = {k: np.asarray(v) for k, v in named_leaves(variables.stats).items()}
        theirs = numpy_models.logits(images, params, stats, variables.model().config)
    return abs(ours - theirs).max() / theirs.std()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(case):
    assert largest_difference(*CASES[case]) < 1e-9


def _swap_offsets(monkeypatch):
    from spvit_jax.models import spatial

    original = spatial.offsets
    monkeypatch.setattr(spatial, "offsets", lambda grid: original(grid)[..., ::-1])


def _tanh_gelu(monkeypatch):
    monkeypatch.setattr(layers_lib, "gelu", jax.nn.gelu)


def _drop_b1(monkeypatch):
    from spvit_jax.models import spatial

    table = spatial.SpatialPrior.table

    def without_b1(self, grid):
        b1, self.b1 = self.b1, nnx.Param(jnp.zeros_like(self.b1[...]))
        result = table(self, grid)
        self.b1 = b1
        return result

    monkeypatch.setattr(spatial.SpatialPrior, "table", without_b1)


def _other_eps(monkeypatch):
    init = nnx.LayerNorm.__init__

    def with_other_eps(self, *args, epsilon, **kwargs):
        init(self, *args, epsilon=1e-6, **kwargs)

    monkeypatch.setattr(nnx.LayerNorm, "__init__", with_other_eps)


@pytest.mark.parametrize("mutate", [_swap_offsets, _tanh_gelu, _drop_b1, _other_eps])
def test_parity_test_sees_a_wrong_model(mutate, monkeypatch):
    mutate(monkeypatch)
    assert largest_difference(*CASES["spvit"]) > 1e-6


def test_train_mode_returns_the_logits_of_every_head():
    overrides = {"depth": 3, "stem_width": 8, "spatial_layers": 1, "distilled": True}
    variables = random_variables("spvit_s", **(SMALL | overrides))
    outputs = run(variables, IMAGES, jax.random.key(0), train=True)
    assert outputs.logits.shape == (2, 7)
    assert outputs.distilled.shape == (2, 7)
    assert outputs.dense.shape == (2, 160, 7)
    expected = (outputs.logits + outputs.distilled) / 2 + outputs.dense.max(1) / 2
    np.testing.assert_allclose(outputs.evaluation_logits(), expected, rtol=1e-6)


def test_drop_path_needs_a_key_and_is_off_in_evaluation():
    variables = random_variables("deit_ti", **SMALL, depth=2, drop_path=0.5)
    images = jax.random.normal(jax.random.key(1), (64, 40, 64, 3))
    keys = jax.random.key(0), jax.random.key(2)
    np.testing.assert_array_equal(*(run(variables, images, key) for key in keys))
    with pytest.raises(ValueError, match="random key"):
        run(variables, images, train=True)
    one, other = (run(variables, images, key, train=True).logits for key in keys)
    changed = (one != other).any(axis=1).mean()
    assert 0.3 < changed < 0.95  # an example changes unless both draws agree in both branches


def test_drop_path_keeps_the_mean():
    x = jnp.ones((20_000, 3))
    factors = layers_lib.draw_drop_path(jax.random.key(0), [0.0, 0.25], len(x))
    assert (factors[0] == 1).all()
    for branch in factors[1]:
        dropped = layers_lib.drop_path(x, branch)
        assert set(np.unique(dropped[:, 0])) == {0.0, np.float32(1 / 0.75)}
        assert abs(dropped.mean() - 1) < 0.02
        assert (dropped == dropped[:, :1]).all()


def test_a_lost_branch_is_zero_even_if_it_is_not_finite():
    x = jnp.array([[jnp.inf], [jnp.nan], [2.0]])
    np.testing.assert_array_equal(
        layers_lib.drop_path(x, jnp.array([0.0, 0.0, 2.0])), [[0], [0], [4]]
    )


def test_an_examples_draws_depend_on_no_other_layer_and_on_no_other_rate():
    """So that a layer of rate 0 is never lost, and a rate changes its own layer alone."""
    key = jax.random.key(0)
    some = layers_lib.draw_drop_path(key, [0.0, 0.5, 0.5], 64)
    others = layers_lib.draw_drop_path(key, [0.2, 0.5, 0.0], 64)
    np.testing.assert_array_equal(some[1], others[1])
    assert (some[0] == 1).all()
    assert (others[2] == 1).all()
    assert len(np.unique(some[1:].reshape(4, -1), axis=0)) == 4


def test_remat_changes_neither_value_nor_gradient():
    def value_and_grad(remat):
        overrides = {"depth": 2, "stem_width": 8, "spatial_layers": 1, "drop_path": 0.5}
        variables = random_variables("spvit_s", **(SMALL | overrides), remat=remat)

        def loss(params):
            module = variables.replace(params=params).model(train=True)
            return module.outputs(IMAGES, jax.random.key(3)).logits.sum()

        return jax.jit(jax.value_and_grad(loss))(variables.params)

    plain, remat = value_and_grad(False), value_and_grad(True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_the_stems_gradient_is_the_same_when_computed_apart(monkeypatch):
    stem = stem_lib.ConvStem(128, 4, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    direction = jax.random.normal(jax.random.key(2), (2, 10, 16, 128))

    def gradient():
        return nnx.jit(nnx.grad(lambda stem: (stem(IMAGES) * direction).sum()))(stem)

    apart = gradient()
    monkeypatch.setattr(stem_lib, "_unfused_gradient", lambda x: x)
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(gradient()), strict=True):
        assert abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * abs(b).max())


def test_batchnorm_of_groups_is_torchs_on_each():
    """In training, its gradient and what it remembers; in evaluation there are no groups."""
    rng = np.random.default_rng(0)
    images, direction = rng.normal(1, 2, (2, 8, 5, 6, 3)).astype(np.float32)
    images *= np.arange(1, 9, dtype=np.float32)[:, None, None, None]
    ours = stem_lib.BatchNorm(3, group=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    ours.scale[...], ours.bias[...] = rng.normal(size=(2, 3))
    ours.mean[...], ours.var[...] = rng.normal(size=3), rng.uniform(1, 2, 3)
    theirs = [torch.nn.BatchNorm2d(3) for _ in range(4)]
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    before = {name: torch.from_numpy(np.array(getattr(ours, names[name])[...])) for name in names}

    @nnx.jit
    def gradient(layer):
        x = jnp.asarray(images)
        return layer(x), jax.grad(lambda x: (nnx.clone(layer)(x) * direction).sum())(x)

    result, grad = gradient(ours)
    for group, layer in enumerate(theirs):
        layer.load_state_dict(before, strict=False)
        part = slice(2 * group, 2 * group + 2)
        x = torch.from_numpy(images[part].transpose(0, 3, 1, 2)).requires_grad_()
        expected = layer(x)
        (expected * torch.from_numpy(direction[part].transpose(0, 3, 1, 2))).sum().backward()
        expected, slope = (t.detach().numpy().transpose(0, 2, 3, 1) for t in (expected, x.grad))
        np.testing.assert_allclose(result[part], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grad[part], slope, rtol=1e-3, atol=1e-5)
    mean, var = (
        torch.stack([getattr(one, f"running_{what}") for one in theirs]).mean(0)
        for what in ("mean", "var")
    )
    np.testing.assert_allclose(ours.mean[...], mean, rtol=1e-4)
    pixels = 2 * 5 * 6  # of which torch remembers the unbiased variance, flax the biased one
    old = 0.9 * before["running_var"]
    np.testing.assert_allclose(ours.var[...], old + (var - old) * (pixels - 1) / pixels, rtol=1e-4)

    ours.eval()
    theirs[0].eval().load_state_dict(
        {name: torch.from_numpy(np.array(getattr(ours, names[name])[...])) for name in names},
        strict=False,
    )
    expected = theirs[0](torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(ours(images), expected.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("deit_ti", {"depth": 2}),
        ("lvvit_s", {"depth": 2, "stem_width": 8}),
        ("spvit_s", {"depth": 3, "stem_width": 8, "spatial_layers": 2}),
        ("mait_t", {"depth": 3}),
        ("cait_xxs24", {"depth": 2, "layer_scale": 0.1}),
        ("swin_t", {"depths": (2, 2), "window": 4, "image_size": 32}),
        ("mait_pyramid_t", {"depths": (2, 2), "image_size": 32}),
    ],
)
def test_bfloat16_computes_in_bfloat16_and_returns_float32(name, overrides):
    """Logits stay within a fraction of their spread, and are not those of float32."""
    settings = SMALL | overrides
    images = IMAGES[:, :32, :32] if "image_size" in overrides else IMAGES
    exact = run(random_variables(name, **settings), images)
    variables = random_variables(name, dtype="bfloat16", **settings)
    rounded = run(variables, images)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < abs(rounded - exact).max() / exact.std() < 0.3
    model = variables.model()
    assert jax.eval_shape(lambda x: model.encode(model.embed(x)), images).dtype == jnp.bfloat16


def test_gains_are_float32_in_bfloat16():
    settings = SMALL | CASES["spvit"][1]
    model = random_variables("spvit_s", dtype="bfloat16", **settings).model()
    assert jax.eval_shape(lambda: model.blocks[0].attn.gain((10, 16))).dtype == jnp.float32


def test_attention_maps_are_those_of_each_layer():
    variables = random_variables("spvit_s", **(SMALL | CASES["spvit"][1]))
    maps = jax.jit(lambda x: variables.model().attention_maps(x))(IMAGES)
    assert [m.weights.shape for m in maps] == [(2, 3, 160, 160)] * 3 + [(2, 3, 161, 161)]
    assert [m.num_prefix for m in maps] == [0, 0, 0, 1]
    for weights, grid, _ in maps:
        assert grid == (10, 16)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_images_of_another_size_are_refused():
    variables = random_variables("deit_ti", **SMALL, depth=1)
    with pytest.raises(InputError, match="pass image_size"):
        run(variables, jnp.zeros((1, 64, 40, 3)))
