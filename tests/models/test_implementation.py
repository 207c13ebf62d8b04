"""Which implementation computes attention, by the devices of the program, and what is refused."""

import dataclasses

import jax
import pytest

from spvit_jax import plan, weights
from spvit_jax.errors import InputError
from spvit_jax.models import create_model, model_config
from spvit_jax.models.complexity import count_macs
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.training import checkpoint
from spvit_jax.training.state import Variables
from tests.helpers.configs import digits
from tests.helpers.tpu_compiler import DIGITS, needs_libtpu, planned


def evaluation_of(run):
    return str(run.eval_step.trace(*run.eval_arguments().values()).jaxpr)


@needs_libtpu
def test_the_devices_of_the_program_decide_not_those_of_the_process():
    assert "fused_attention" in evaluation_of(planned("v5e:2x2", {}))
    assert "fused_attention" not in evaluation_of(planned("v5e:2x2", {"model.attention": "xla"}))
    assert "fused_attention" not in evaluation_of(plan.training_run(digits("vit"), DIGITS))


def test_a_model_alone_is_for_this_machine():
    model = create_model("deit_ti", image_size=32, depth=1)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
    assert "pallas_call" not in str(jax.make_jaxpr(model)(images))


def test_masked_heads_are_local_where_there_are_many_tokens():
    def macs(**settings):
        return count_macs(model_config("mait_t", depth=3, **settings))

    few, many = {"image_size": 64}, {"image_size": 224}
    assert macs(**few) == macs(**few, attention="xla") > macs(**few, attention="local")
    assert macs(**many) == macs(**many, attention="local") < macs(**many, attention="xla")


def test_a_kernels_products_count():
    """Heads in groups, and all in one, whose columns are padded."""
    for name in ("deit_s", "deit_ti"):
        config = model_config(name, image_size=32, depth=1)
        kernel = dataclasses.replace(config, attention="fused")
        assert count_macs(kernel) == count_macs(config)


REFUSED = {
    "a CPU": (
        "deit_ti",
        {},
        "attention is 'fused', a kernel for TPUs and one for GPUs, and the devices are CPUs; "
        "choose 'auto' or 'xla', or for tests 'fused_interpret'",
    ),
    "width": (
        "deit_ti",
        {"num_heads": 1, "dim": 192},
        "on heads of width 192 in float32; the kernel knows widths of 8 to 128 in float32 or "
        "bfloat16: choose 'auto' or 'xla'",
    ),
    "dtype": ("deit_ti", {"dtype": "float64"}, "on heads of width 64 in float64"),
    "talking heads": ("cait_xxs24", {}, "does not know talking heads; choose 'auto' or 'xla'"),
    "windows": ("swin_t", {"depths": (1,)}, "does not know the bias of Swin's windows"),
    "a name": ("deit_ti", {"attention": "flash"}, "attention is 'flash'; expected 'auto' or 'xla'"),
}


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_kernel_is_refused_where_it_cannot_run(name, settings, message):
    size = {} if "depths" in settings else {"depth": 1}

    def trace():
        model = create_model(name, image_size=32, **size, **({"attention": "fused"} | settings))
        return jax.eval_shape(model, jax.ShapeDtypeStruct((2, 32, 32, 3), "float32"))

    with pytest.raises(InputError) as error:
        trace()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_is_refused_before_its_first_step():
    with pytest.raises(InputError, match="the devices are CPUs"):
        plan.training_run(digits("vit"), DIGITS, {"model.attention": "fused"})


def test_weights_do_not_say_how_attention_is_computed(tmp_path):
    """Those of a run on TPUs are evaluated, distilled and converted anywhere."""
    model = model_config("deit_ti", image_size=16, dim=16, num_heads=1, depth=1, attention="fused")
    variables = Variables.of(model.build(CountedRngs(jax.random.key(0))))
    checkpoint.save_variables(tmp_path / "weights", variables, model)
    found = weights.find(tmp_path / "weights", None)
    assert found.config == dataclasses.replace(model, attention="auto")


def test_masked_heads_at_linear_cost_are_traced_for_any_number_of_images():
    """As an exported program is."""
    model = create_model("mait_pyramid_t", image_size=64, depths=(1,), attention="local")
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 64, 64, 3), "float32")
    assert jax.eval_shape(model, images).shape == (batch, 1000)
