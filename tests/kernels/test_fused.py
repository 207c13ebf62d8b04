"""The fused kernel, in Pallas' interpret mode, against the readable attention and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax import plan
from spvit_jax.kernels import plan as plans
from spvit_jax.kernels.fused import fused_attention, supports
from spvit_jax.models import list_models, model_config
from spvit_jax.models.naming import named_leaves
from spvit_jax.training import sharding
from tests.helpers.configs import digits
from tests.helpers.kernels import (
    HARD,
    SOFT,
    assert_close,
    by_kernel_and_by_xla,
    distance,
    factors,
    gradients,
    kernels,
    kernels_of_a_gradient,
    loss_of_layers,
    on_a_mesh_and_on_one_device,
    reference,
)
from tests.helpers.tpu_compiler import DIGITS, one_chip


@pytest.mark.parametrize(
    ("grid", "num_prefix", "heads", "head_dim", "kind"),
    [
        ((3, 5), 1, 4, 64, {}),
        ((4, 4), 0, 3, 48, {"spatial_prior": True}),
        ((5, 3), 2, 2, 32, {"mask": SOFT}),
        ((5, 7), 1, 4, 60, {"mask": HARD}),
        ((2, 9), 1, 3, 96, {"spatial_prior": True, "mask": SOFT}),
        ((6, 3), 2, 4, 64, {"spatial_prior": True, "mask": HARD}),
        ((3, 5), 1, 2, 32, {"spatial_prior": True, "position_bias": (3, 5), "mask": HARD}),
    ],
    ids=["none", "prior", "soft", "hard", "prior and soft", "prior and hard", "all"],
)
def test_the_kernel_is_the_attention_of_xla(monkeypatch, grid, num_prefix, heads, head_dim, kind):
    """Gradients too: of input and projections, through G of the prior's parameters, and of B's."""
    monkeypatch.setattr(plans, "_QUERY_BLOCK", 16)
    monkeypatch.setattr(plans, "_PROGRAM_TOKENS", 40)
    results = by_kernel_and_by_xla(grid, num_prefix, heads, head_dim, 6, kind)
    assert_close(*results, 1e-6)


def interpreted(qkv, gain, bias):
    return fused_attention(qkv, 4, gain, bias, interpret=True)


@functools.cache
def exact_gradients():
    """In float64: two roundings to float32 may differ by more than either has lost."""
    with jax.enable_x64(True):
        arguments = [factor.astype(jnp.float64) for factor in factors()]
        return gradients(functools.partial(reference, heads=4), arguments)


@pytest.mark.parametrize("by_itself", [False, True])
def test_gain_and_bias_have_gradients_of_any_value(monkeypatch, by_itself):
    """With the heads of whole tiles in a program, or each by itself, as where memory is short."""
    if by_itself:
        monkeypatch.setattr(plans, "_LARGEST_VMEM_LIMIT", 0)
    assert_close(gradients(interpreted, factors()), exact_gradients(), 1e-6)


def test_on_a_mesh_devices_add_up_the_gradients_of_parameters_and_not_of_the_gain():
    grads, expected, communicated = on_a_mesh_and_on_one_device(head_dim=32)
    assert_close(grads, expected, 1e-6)
    assert communicated
    assert not any("[2,16,16]" in shape for shape in communicated)


def test_bfloat16_is_as_exact_as_xlas():
    qkv, gain, bias = factors(dtype=jnp.bfloat16)
    exact = gradients(functools.partial(reference, heads=4), (qkv.astype("float32"), gain, bias))
    xla = gradients(functools.partial(reference, heads=4), (qkv, gain, bias))
    ours = gradients(interpreted, (qkv, gain, bias))
    for name, leaf in exact.items():
        assert ours[name].dtype == xla[name].dtype
        error = distance(ours[name], leaf)
        assert error < 1.1 * distance(xla[name], leaf), name
        assert error < 0.01 * np.linalg.norm(leaf), name


def test_masks_cost_no_gradient():
    program = kernels_of_a_gradient
    # Of the projection and its bias; and of the prior's gain.
    plain = [("fused_attention", 1), ("fused_attention_backward", 2)]
    assert program() == program(mask=SOFT) == program(mask=HARD) == plain
    assert program(spatial_prior=True, mask=HARD) == [plain[0], ("fused_attention_backward", 3)]


@pytest.mark.parametrize("name", sorted({*list_models("*vit*"), *list_models("[dm]*")}))
def test_every_model_fits_a_chip_on_any_grid_up_to_32_by_32(name):
    config = model_config(name)
    heads, dim = config.num_heads, config.dim
    qkv = jax.ShapeDtypeStruct((16, 1026, 3 * dim), jnp.float32)
    assert plans.Plan.of(qkv, heads, 2).fits
    assert supports(dim // heads, jnp.float32)


@functools.cache
def model_gradients(**execution):
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    loss, params = loss_of_layers(images, **execution)
    return kernels(jax.grad(loss), params), named_leaves(jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize("remat", [False, True])
def test_loops_and_remat_change_no_gradient(remat):
    _, expected = model_gradients(attention="xla")
    names, looped = model_gradients(attention="fused_interpret", scan=True, remat=remat)
    # A loop of each kind of layer; it keeps the kernel's result unless it is to recompute all.
    assert [name for name, _ in names].count("fused_attention") == (4 if remat else 2)
    assert_close(looped, expected, 3e-5)


def test_some_steps_of_digits_are_xlas():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 12, 12, 3)).astype(np.uint8),
        "label": rng.integers(0, 10, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
    }

    def train(name):
        changes = {
            "model.attention": name,
            "model.depth": 2,
            "model.spatial_layers": 1,
            "model.stem_width": 0,
        }
        changes |= {"data.batch_size": 16, "schedule.warmup": "1 steps"}
        run = plan.training_run(digits("spvit"), DIGITS, changes)
        state = run.create()
        for _ in range(4):
            state = run.train_step(state, sharding.put_batch(batch, run.mesh), run.root, None)
        return named_leaves(state.model.params)

    assert_close(train("fused_interpret"), train("xla"), 1e-4)


@pytest.mark.parametrize(
    ("topology", "tokens", "dtype"), [("v5e:1x1", 577, "bfloat16"), ("v6e:1x1", 197, "float32")]
)
def test_it_compiles_for_tpus(topology, tokens, dtype):
    chip = one_chip(topology)

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    def value(qkv, gain, bias, qkv_bias):
        out = fused_attention(qkv, 2, gain, bias, qkv_bias=qkv_bias)
        return out.astype(jnp.float32).sum()

    qkv, factor = array(1, tokens, 384, dtype=dtype), array(2, tokens, tokens)
    gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2, 3)))
    compiled = gradients.lower(qkv, factor, factor, array(384)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2
