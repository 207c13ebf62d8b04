"""What the TPU's compiler makes of the train step, against what must be so."""

import pytest

from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.preflight.clock import CYCLES
from spvit_jax.preflight.compile import ACTIVATIONS, TEMPORARIES
from spvit_jax.preflight.roofline import (
    CompiledRun,
    compile_eval_step,
    compile_train_step,
    roofline,
)
from spvit_jax.preflight.topology import CHIPS, get_topology
from tests.helpers.tpu_compiler import WIDE, needs_libtpu, planned

pytestmark = [needs_libtpu, pytest.mark.usefixtures("lightly_optimized")]

V5E = CHIPS["v5e"]
DEVICES = 4
MESHES = {
    "replicated": {},
    "fsdp": {"mesh.fsdp": 4},
    "both, in micro-batches": {"mesh.fsdp": 2, "optim.accumulate": 4},
}


@pytest.fixture(scope="module")
def steps():
    """The train step on each mesh."""
    return {
        name: compile_train_step(planned("v5e:2x2", WIDE | changes), V5E)
        for name, changes in MESHES.items()
    }


@pytest.fixture(scope="module")
def compiled(steps):
    run = planned("v5e:2x2", WIDE)
    return CompiledRun(
        run, get_topology("v5e:2x2"), steps["replicated"], compile_eval_step(run, V5E)
    )


def by_axis(step):
    return {(one.kind, one.axis): one.sent for one in step.collectives}


@pytest.mark.parametrize("name", MESHES)
def test_memory_by_kind_adds_up_to_the_compilers_own_figures(steps, compiled, name):
    for step in (steps[name], compiled.evaluation):
        sizes = step.compiler
        beside = ("outputs", ACTIVATIONS, TEMPORARIES, "code")
        arguments = sum(size for kind, size in step.memory.items() if kind not in beside)
        assert arguments == sizes["arguments"]
        assert step.total == (
            sizes["arguments"]
            + (sizes["outputs"] - sizes["aliased"])
            + sizes["temporaries"]
            + sizes["code"]
        )


def test_micro_batches_keep_their_activations_one_after_the_other(steps):
    once, looped = (steps[name].memory for name in ("replicated", "both, in micro-batches"))
    assert looped[ACTIVATIONS] / once[ACTIVATIONS] == pytest.approx(1 / 4, rel=0.03)
    assert once[ACTIVATIONS] > once[TEMPORARIES] > 0


def test_the_state_is_donated(steps):
    memory = steps["replicated"].memory
    state = sum(memory[kind] for kind in ("parameters", "moving average", "optimizer"))
    assert steps["replicated"].compiler["aliased"] >= state
    assert memory["outputs"] < 0.01 * state


def test_fsdp_divides_parameters_and_optimizer_by_the_axis(steps):
    whole, parts = steps["replicated"], steps["fsdp"]
    for kind in ("parameters", "optimizer", "moving average"):
        assert whole.memory[kind] / parts.memory[kind] == pytest.approx(4, rel=0.03)
    # The same from the compiler's figure alone.
    batch = whole.memory["batch"]
    arguments = [step.compiler["arguments"] - batch for step in (whole, parts)]
    assert arguments[0] / arguments[1] == pytest.approx(4, rel=0.02)


def test_memory_of_parameters_is_theirs(compiled):
    nbytes = 4 * count_parameters(compiled.run.model)
    assert compiled.train.memory["parameters"] == pytest.approx(nbytes, rel=0.05)
    assert compiled.train.memory["optimizer"] == pytest.approx(2 * nbytes, rel=0.05)


def test_operations_are_the_models_and_the_compilers(compiled):
    images = compiled.run.config.data.batch_size / DEVICES
    # Forward once, and backward to inputs and to weights; not to the images, though.
    assert compiled.train.flops == pytest.approx(
        6 * count_macs(compiled.run.model) * images, rel=0.05
    )
    assert compiled.train.flops == pytest.approx(compiled.train.compiler["flops"], rel=0.05)
    evaluated = compiled.run.eval_batch_size / DEVICES
    assert compiled.evaluation.flops == pytest.approx(
        2 * count_macs(compiled.run.model) * evaluated, rel=0.05
    )


def test_loops_count_as_often_as_they_run(steps):
    once, looped = steps["replicated"], steps["both, in micro-batches"]
    assert looped.flops == pytest.approx(once.flops, rel=0.02)
    assert looped.compiler["flops"] < 0.5 * once.compiler["flops"]  # counts the body once
    assert looped.unknown_loops == 0


def test_replicated_parameters_cost_one_all_reduce_of_their_gradients(steps, compiled):
    sent = by_axis(steps["replicated"])
    nbytes = 4 * count_parameters(compiled.run.model)
    assert {axis for _, axis in sent} == {"data"}
    assert sent["all-reduce", "data"] == pytest.approx(2 * 3 / 4 * nbytes, rel=0.02)


def test_split_parameters_are_gathered_and_their_gradients_scattered(steps, compiled):
    sent = by_axis(steps["fsdp"])
    nbytes = 4 * count_parameters(compiled.run.model)
    assert {axis for _, axis in sent} == {"fsdp"}
    gathered = sent["all-gather", "fsdp"]
    assert 3 / 4 * nbytes / 2 <= 1.05 * gathered  # at least once, in bfloat16
    assert sent["reduce-scatter", "fsdp"] <= 1.05 * 3 / 4 * nbytes


def test_on_a_mesh_of_two_axes_each_has_its_own(steps):
    sent = by_axis(steps["both, in micro-batches"])
    assert {axis for _, axis in sent} <= {"data", "fsdp", "data×fsdp"}
    assert sent["all-gather", "fsdp"] > 0
    assert sum(sent[key] for key in sent if key[1] == "data") > 0


def test_between_slices_go_the_gradients_and_little_else():
    run = planned("v5e:2x2", WIDE | {"mesh.fsdp": 2}, num_slices=2)
    assert run.mesh.shape == {"data": 4, "fsdp": 2}
    topology = get_topology("v5e:2x2", num_slices=2)
    assert topology.hosts == 2
    step = compile_train_step(run, V5E)
    nbytes = 4 * count_parameters(run.model)
    # Each of the four chips of a slice has a quarter of the sum, and exchanges it for the others'.
    assert step.sent_to_slices == pytest.approx(nbytes / 4, rel=0.02)
    assert by_axis(step)["all-reduce", "slices"] == step.sent_to_slices
    assert step.sent > 2 * step.sent_to_slices
    chip = topology.chip
    assert roofline(step, chip).network == step.sent_to_slices / chip.dcn_bandwidth > 0


def test_the_bound_is_that_of_the_slowest(compiled):
    chip, limits = compiled.chip, compiled.roofline
    assert limits.compute == compiled.train.flops / chip.flops
    assert limits.memory == compiled.train.hbm_bytes / chip.hbm_bandwidth
    assert limits.interconnect == compiled.train.sent / chip.ici_bandwidth
    assert limits.network == 0
    assert limits.seconds == max(limits)
    at_best = compiled.at_best
    assert at_best.images_per_second == compiled.run.config.data.batch_size / limits.seconds
    flops = 6 * count_macs(compiled.run.model) * at_best.images_per_second
    assert at_best.mfu == pytest.approx(flops / (DEVICES * 197e12))
    assert 0 < compiled.expected.mfu < at_best.mfu < 1


def test_hours_are_those_of_all_steps_and_evaluations(compiled):
    assert (compiled.run.steps, compiled.run.eval_steps) == (1600, 10 * 2)
    assert compiled.at_best.hours * 3600 > 1600 * compiled.roofline.seconds
    expected = compiled.expected
    assert expected.hours * 3600 == pytest.approx(1600 * expected.step + 20 * expected.eval_step)
    assert expected.chip_hours == DEVICES * expected.hours


def test_evaluation_counts_the_state_that_waits(compiled):
    memory = compiled.train.memory
    waiting = memory["parameters"] + memory["optimizer"]
    assert compiled.resident == pytest.approx(waiting, rel=0.01)
    assert compiled.needed == max(
        compiled.train.total, compiled.evaluation.total + compiled.resident
    )


def test_the_expected_time_is_of_all_parts_and_above_the_roofline(steps, compiled):
    clock = steps["replicated"].clock
    assert sum(clock.by_part.values()) == pytest.approx(clock.seconds)
    assert compiled.expected.step == max(clock.seconds, compiled.roofline.seconds)
    parts = {"attention", "MLP", "qkv and projection", "norms", "stem", "heads and loss"}
    assert parts | {"optimizer", "collectives"} <= set(clock.by_part)
    assert clock.by_part.get("other", 0) < 0.1 * clock.seconds  # copies between parts
    # The compiler's cycles, and not an estimate, of nearly all.
    assert clock.by_basis[CYCLES] > 0.9 * clock.seconds
