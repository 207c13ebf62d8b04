"""What the TPU's compiler makes of the train step, against what must be so."""

import jax
import pytest

from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.tpu.compiled import TEMPORARIES
from tests.tpu.compiler import WIDE, account, needs_libtpu

pytestmark = needs_libtpu

CHIPS = 4
MESHES = {
    "replicated": {},
    "fsdp": {"mesh.fsdp": 4},
    "both, in micro-batches": {"mesh.fsdp": 2, "optim.accumulate": 4},
}


@pytest.fixture(scope="module")
def accounts():
    return {name: account("v5e:2x2", WIDE | changes) for name, changes in MESHES.items()}


def by_axis(step):
    return {(one.kind, one.axis): one.sent for one in step.collectives}


@pytest.mark.parametrize("name", MESHES)
def test_memory_by_kind_adds_up_to_the_compilers_own_figures(accounts, name):
    for step in (accounts[name].train, accounts[name].evaluation):
        sizes = step.compiler
        beside = ("outputs", TEMPORARIES, "code")
        arguments = sum(size for kind, size in step.memory.items() if kind not in beside)
        assert arguments == sizes["arguments"]
        assert step.total == (
            sizes["arguments"]
            + (sizes["outputs"] - sizes["aliased"])
            + sizes["temporaries"]
            + sizes["code"]
        )


def test_the_state_is_donated(accounts):
    memory = accounts["replicated"].train.memory
    state = sum(memory[kind] for kind in ("parameters", "moving average", "optimizer"))
    assert accounts["replicated"].train.compiler["aliased"] >= state
    assert memory["outputs"] < 0.01 * state


def test_fsdp_divides_parameters_and_optimizer_by_the_axis(accounts):
    whole, parts = accounts["replicated"].train, accounts["fsdp"].train
    for kind in ("parameters", "optimizer", "moving average"):
        assert whole.memory[kind] / parts.memory[kind] == pytest.approx(4, rel=0.02)
    # The same from the compiler's figure alone.
    batch = whole.memory["batch"]
    arguments = [step.compiler["arguments"] - batch for step in (whole, parts)]
    assert arguments[0] / arguments[1] == pytest.approx(4, rel=0.02)


def test_memory_of_parameters_is_theirs(accounts):
    one = accounts["replicated"]
    nbytes = 4 * count_parameters(one.run.model)
    assert one.train.memory["parameters"] == pytest.approx(nbytes, rel=0.05)
    assert one.train.memory["optimizer"] == pytest.approx(2 * nbytes, rel=0.05)


def test_operations_are_the_models_and_the_compilers(accounts):
    one = accounts["replicated"]
    images = one.run.config.data.batch_size / CHIPS
    # Forward once, and backward to inputs and to weights; not to the images, though.
    assert one.train.flops == pytest.approx(6 * count_macs(one.run.model) * images, rel=0.05)
    assert one.train.flops == pytest.approx(one.train.compiler["flops"], rel=0.05)
    evaluated = one.run.eval_batch_size / CHIPS
    assert one.evaluation.flops == pytest.approx(
        2 * count_macs(one.run.model) * evaluated, rel=0.05
    )


def test_loops_count_as_often_as_they_run(accounts):
    once, looped = accounts["replicated"].train, accounts["both, in micro-batches"].train
    assert looped.flops == pytest.approx(once.flops, rel=0.02)
    assert looped.compiler["flops"] < 0.5 * once.compiler["flops"]  # counts the body once
    assert looped.unknown_loops == 0


def test_replicated_parameters_cost_one_all_reduce_of_their_gradients(accounts):
    sent = by_axis(accounts["replicated"].train)
    nbytes = 4 * count_parameters(accounts["replicated"].run.model)
    assert {axis for _, axis in sent} == {"data"}
    assert sent["all-reduce", "data"] == pytest.approx(2 * 3 / 4 * nbytes, rel=0.02)


def test_split_parameters_are_gathered_and_their_gradients_scattered(accounts):
    sent = by_axis(accounts["fsdp"].train)
    nbytes = 4 * count_parameters(accounts["fsdp"].run.model)
    assert {axis for _, axis in sent} == {"fsdp"}
    gathered = sent["all-gather", "fsdp"]
    assert 3 / 4 * nbytes / 2 <= 1.05 * gathered  # at least once, in bfloat16
    assert sent["reduce-scatter", "fsdp"] <= 1.05 * 3 / 4 * nbytes


def test_on_a_mesh_of_two_axes_each_has_its_own(accounts):
    sent = by_axis(accounts["both, in micro-batches"].train)
    assert {axis for _, axis in sent} <= {"data", "fsdp", "data×fsdp"}
    assert sent["all-gather", "fsdp"] > 0
    assert sum(sent[key] for key in sent if key[1] == "data") > 0


def test_the_bound_is_that_of_the_slowest(accounts):
    one = accounts["replicated"]
    chip, bound = one.chip, one.bound
    assert bound.compute == one.train.flops / chip.flops
    assert bound.memory == one.train.hbm_bytes / chip.hbm_bandwidth
    assert bound.interconnect == one.train.sent / chip.ici_bandwidth
    assert bound.seconds == max(bound)
    assert one.images_per_second == one.run.config.data.batch_size / bound.seconds
    flops = 6 * count_macs(one.run.model) * one.images_per_second
    assert one.mfu == pytest.approx(flops / (CHIPS * 197e12))
    assert 0 < one.mfu < 1


def test_hours_are_those_of_all_steps_and_evaluations(accounts):
    one = accounts["replicated"]
    assert (one.run.steps, one.run.eval_steps) == (1600, 10 * 2)
    assert one.hours * 3600 > 1600 * one.bound.seconds


def test_evaluation_counts_the_state_that_waits(accounts):
    one = accounts["replicated"]
    memory = one.train.memory
    waiting = memory["parameters"] + memory["optimizer"]
    assert one.resident == pytest.approx(waiting, rel=0.01)
    assert one.needed == max(one.train.total, one.evaluation.total + one.resident)


def test_shapes_are_not_arrays(accounts):
    state = accounts["fsdp"].run.program.abstract
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
