"""The fused kernel for GPUs: interpreted, against the readable attention, and lowered for CUDA."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.kernels import fused_gpu
from spvit_jax.kernels.fused_gpu import fused_attention
from spvit_jax.models import create_model, implementation, model_config
from spvit_jax.models.complexity import count_macs
from tests.helpers.kernels import (
    HARD,
    SMALL,
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

FORWARD, DQ, DKV = ("fused_attention", 2), ("fused_attention_dq", 1), ("fused_attention_dkv", 2)


def dfactors(count):
    return ("fused_attention_dfactors", count)


@pytest.fixture
def on_gpu(monkeypatch):
    """Programs are traced as if for GPUs; "fused_interpret" is their kernel then."""
    monkeypatch.setattr(implementation, "platform", lambda: "gpu")


@pytest.mark.parametrize(
    ("grid", "num_prefix", "heads", "head_dim", "batch", "kind"),
    [
        ((3, 5), 1, 2, 32, 3, {}),
        ((4, 8), 2, 2, 64, 1, {"mask": HARD}),
        ((2, 9), 0, 3, 16, 10, {"spatial_prior": True, "mask": SOFT}),
        ((3, 7), 1, 2, 32, 11, {"spatial_prior": True, "position_bias": (3, 7), "mask": HARD}),
    ],
    ids=["none", "hard", "prior and soft", "all"],
)
def test_the_kernel_is_the_attention_of_xla(
    on_gpu, monkeypatch, grid, num_prefix, heads, head_dim, batch, kind
):
    """Gradients too: of input and projections, through G of the prior's parameters, and of B's."""
    monkeypatch.setattr(fused_gpu, "_TILE", 16)
    results = by_kernel_and_by_xla(grid, num_prefix, heads, head_dim, batch, kind)
    assert_close(*results, 2e-6)


def interpreted(qkv, gain, bias):
    return fused_attention(qkv, 2, gain, bias, interpret=True)


plain = functools.partial(reference, heads=2)


def test_gain_and_bias_have_gradients_of_any_value():
    qkv, gain, bias = factors(batch=3, tokens=197, heads=2, head_dim=16)
    # A whole tile of keys, and a part of the next, without a pair for every other query.
    arguments = qkv, gain, bias.at[0, ::2, :70].set(-jnp.inf)
    assert_close(gradients(interpreted, arguments), gradients(plain, arguments), 2e-6)


def test_bfloat16_is_about_as_exact_as_xlas():
    """The gradient of scores is computed with the rounded result, by XLA with the weights."""
    qkv, gain, bias = factors(batch=2, tokens=70, heads=2, dtype=jnp.bfloat16)
    exact = gradients(plain, (qkv.astype("float32"), gain, bias))
    xla, ours = gradients(plain, (qkv, gain, bias)), gradients(interpreted, (qkv, gain, bias))
    for name, leaf in exact.items():
        assert ours[name].dtype == xla[name].dtype
        error = distance(ours[name], leaf)
        assert error < (1 if name == "out" else 1.5) * distance(xla[name], leaf), name
        assert error < 0.005 * np.linalg.norm(leaf), name


def test_on_a_mesh_devices_add_up_the_gradients_of_parameters_and_not_of_the_gain(on_gpu):
    grads, expected, communicated = on_a_mesh_and_on_one_device(head_dim=16)
    assert_close(grads, expected, 1e-6)
    assert communicated
    assert not any("[2,16,16]" in shape or "[2,64,64]" in shape for shape in communicated)


def test_masks_cost_no_gradient(on_gpu):
    program = kernels_of_a_gradient
    assert program() == program(mask=SOFT) == program(mask=HARD) == [FORWARD, DKV, DQ]
    assert program(spatial_prior=True, mask=HARD) == [FORWARD, dfactors(1), DKV, DQ]
    both = {"spatial_prior": True, "position_bias": (3, 3)}
    assert program(**both) == [FORWARD, dfactors(2), DKV, DQ]


@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_keeps_what_the_backward_pass_needs(on_gpu, remat):
    """And recomputes all if it is to."""
    images = jnp.zeros((4, 16, 16, 3))
    loss, params = loss_of_layers(images, attention="fused_interpret", scan=True, remat=remat)
    names = [name for name, _ in kernels(jax.grad(loss), params)]
    assert names.count("fused_attention") == (4 if remat else 2)  # a loop of each kind of layer
    assert names.count("fused_attention_dfactors") == 1


@functools.cache
def gpu_mesh():
    """A mesh of one GPU, for programs that are lowered where there is none."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"), abstract_device=device)


# Later versions compile Triton's programs when they lower, with what comes with JAX for CUDA.
lowers_triton = pytest.mark.skipif(jax.__version_info__ > (0, 10, 2), reason="needs CUDA")


def lowered(function, *arguments):
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return re.findall(r"custom_call @(\S*triton\S*?)\(", program.as_text())


@lowers_triton
@pytest.mark.parametrize(
    ("settings", "has_kernel"),
    [
        ({"attention": "auto"}, True),
        ({"attention": "fused", "masked_heads": ((0,), ()), "mask_kind": "hard"}, True),
        ({"attention": "xla"}, False),
        ({"attention": "auto", "dtype": "float32"}, False),
        ({"attention": "auto", "dim": 96}, False),  # heads of 48
    ],
)
def test_it_is_chosen_and_lowered_for_cuda(settings, has_kernel):
    settings = {"dim": 64, "dtype": "bfloat16", "depth": 2, "stem_width": 0} | settings
    model = model_config("spvit_s", **SMALL | settings, spatial_layers=1).abstract()
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)

    def loss(state, images):
        return nnx.merge(graphdef, state)(images).astype(jnp.float32).sum()

    # In each of two layers, forward, of queries, of keys and values; and of one layer's gain.
    assert len(lowered(jax.grad(loss), state, images)) == (7 if has_kernel else 0)


def card(capability):
    return [types.SimpleNamespace(compute_capability=capability)]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", "xla"), ("8.0", "fused"), ("12.1", "fused"), ("gfx942", "xla")],
)
def test_auto_is_xla_on_cards_that_do_not_run_the_kernel(on_gpu, monkeypatch, capability, expected):
    monkeypatch.setattr(jax, "local_devices", lambda backend: card(capability))
    qkv = jax.ShapeDtypeStruct((2, 9, 192), "bfloat16")
    assert implementation.choose("auto", qkv, 2, 1) == expected
    if expected == "xla":
        with pytest.raises(InputError, match="which these are not"):
            implementation.choose("fused", qkv, 2, 1)


@pytest.mark.parametrize(
    ("width", "dtype"), [(48, "bfloat16"), (128, "bfloat16"), (64, "float32"), (64, "float64")]
)
def test_what_the_kernel_does_not_know_is_refused_if_asked_for(on_gpu, width, dtype):
    qkv = jax.ShapeDtypeStruct((2, 9, 6 * width), dtype)
    assert implementation.choose("auto", qkv, 2, 1) == "xla"
    with pytest.raises(InputError) as error:
        implementation.choose("fused", qkv, 2, 1)
    assert str(error.value) == (
        f"attention is 'fused' on heads of width {width} in {dtype}; the kernel for GPUs knows "
        "widths of 16, 32 and 64 in bfloat16: choose 'auto' or 'xla'"
    )


def test_a_program_for_any_number_of_images_is_xlas(on_gpu):
    model = create_model("deit_ti", image_size=32, depth=1, dtype="bfloat16")
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), "float32")
    assert jax.eval_shape(model, images).shape == (batch, 1000)


def test_products_are_counted_without_those_of_padding():
    def config(attention):
        return model_config(
            "deit_ti", image_size=32, depth=1, dtype="bfloat16", attention=attention
        )

    expected = count_macs(config("xla"))
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        assert count_macs(config("auto")) == count_macs(config("fused")) == expected
