"""Which changes are tried where a run does not fit, and in which order."""

import dataclasses

import jax
import pytest

from spvit_jax import plan
from spvit_jax.preflight.compile import EVAL_STEP, TRAIN_STEP
from spvit_jax.preflight.search import Trial, as_flags, candidates, search
from spvit_jax.preflight.topology import CHIPS, GIB, Topology
from spvit_jax.training.run import DataSize
from tests.helpers.configs import digits

V5E = CHIPS["v5e"]


def planned(**model):
    config = digits("vit")
    config.model.update({"depth": 1} | model)
    config.data.batch_size = 128
    return plan.training_run(config, DataSize(1297, 500, 10))


@pytest.fixture(scope="module")
def run():
    return planned(dim=48)


def test_what_is_needed_for_activations_is_not_looked_for_in_parameters(run):
    # The state of this model is small: splitting it cannot make up for 20 GiB.
    changes = list(candidates(run, V5E, 20 * GIB))
    assert changes[0] == {"model.remat": True}
    assert {"optim.accumulate": 2} in changes
    assert not any(set(one) == {"mesh.fsdp"} for one in changes)


def test_what_is_needed_for_parameters_is_looked_for_there():
    # Parameters, two moments and an average: 13.9 GiB, and 17.2, which no chip of v5e has.
    assert next(candidates(planned(dim=9216, num_heads=72), V5E, 17.3 * GIB)) == {"mesh.fsdp": 2}
    changes = list(candidates(planned(dim=10240, num_heads=80), V5E, 21 * GIB))
    assert changes[0] == {"mesh.fsdp": 2}
    assert all("mesh.fsdp" in one for one in changes)


def test_stronger_means_where_more_is_needed(run):
    changes = list(candidates(run, V5E, 100 * GIB))
    assert {"model.remat": True} not in changes
    assert changes[0] == {"optim.accumulate": 8}  # 100 GiB in 7 parts fit, but 16 images do not
    assert {"model.remat": True, "optim.accumulate": 4} in changes


def test_what_is_on_is_not_tried_again(run):
    model = dataclasses.replace(run.model, remat=True)
    changes = list(candidates(dataclasses.replace(run, model=model), V5E, 20 * GIB))
    assert changes
    assert not any("model.remat" in one for one in changes)


def test_a_preset_that_splits_nothing_is_changed_with_the_axis(run):
    run.config.mesh.sharding, run.config.mesh.data = "replicated", 8
    changes = [one for one in candidates(run, V5E, 20 * GIB) if "mesh.fsdp" in one]
    run.config.mesh.sharding, run.config.mesh.data = "fsdp", -1
    assert changes
    assert all(one["mesh.sharding"] == "fsdp" for one in changes)
    assert all(one["mesh.data"] == -1 for one in changes)


def test_micro_batches_keep_an_image_on_each_chip(run):
    for one in candidates(run, V5E, 300 * GIB):
        assert 128 % (8 * one.get("optim.accumulate", 1)) == 0


@pytest.fixture
def ways(run, monkeypatch):
    """Returns a search for one way, where steps need so many GiB, and less for less at once."""

    def find(training, evaluation):
        def compile_trial(replan, topology, changes):
            train = training / changes.get("optim.accumulate", 1)
            if train > 15.75:
                return Trial(changes, None, train * GIB, too_large=TRAIN_STEP)
            evaluate = evaluation * changes.get("data.eval_batch_size", 256) / 256
            too_large = EVAL_STEP if evaluate > 15.75 else None
            return Trial(changes, None, evaluate * GIB, too_large=too_large)

        monkeypatch.setattr("spvit_jax.preflight.search.compile_trial", compile_trial)
        tried = []
        topology = Topology("v5e:2x4", V5E, jax.devices(), hosts=2, slice_name="v5e:2x4")
        failed = compile_trial(None, topology, {})
        found = search(run, topology, None, failed, ways=1, report=tried.append)
        return [one.changes for one in found], [one.changes for one in tried]

    return find


def test_an_evaluation_that_is_too_large_becomes_smaller_and_nothing_else(ways):
    found, tried = ways(10, 50)
    assert found == tried == [{"data.eval_batch_size": 64}]


def test_what_trains_but_cannot_be_evaluated_is_tried_again(ways):
    found, tried = ways(20, 20)
    assert tried[-2:] == [
        {"optim.accumulate": 2},
        {"optim.accumulate": 2, "data.eval_batch_size": 128},
    ]
    assert found == tried[-1:]


def test_an_evaluation_that_cannot_become_small_enough_ends_the_search(ways):
    assert ways(10, 2000) == ([], [])


def test_changes_as_flags():
    changes = {"model.remat": True, "mesh.fsdp": 8}
    assert as_flags(changes) == "--config.model.remat=True --config.mesh.fsdp=8"
