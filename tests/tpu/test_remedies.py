"""Which changes are tried where a run does not fit, and in which order."""

import dataclasses

import jax
import pytest

from spvit_jax.tpu.account import DataFacts, plan
from spvit_jax.tpu.chips import CHIPS, GIB, Topology
from spvit_jax.tpu.remedies import as_flags, candidates
from tests.test_config import digits


@pytest.fixture(scope="module")
def run():
    config = digits("vit")
    config.model.update({"depth": 1, "dim": 48})
    config.data.batch_size = 128
    topology = Topology("v5e:2x4", CHIPS["v5e"], jax.devices(), hosts=2)
    return plan(config, topology, DataFacts(1297, 500, 10))


def test_what_is_needed_for_activations_is_not_looked_for_in_parameters(run):
    # The state of this model is small: splitting it cannot make up for 20 GiB.
    changes = list(candidates(run, 20 * GIB))
    assert changes[0] == {"model.remat": True}
    assert {"optim.accumulate": 2} in changes
    assert not any(set(one) == {"mesh.fsdp"} for one in changes)


def test_stronger_means_where_more_is_needed(run):
    changes = list(candidates(run, 100 * GIB))
    assert {"model.remat": True} not in changes
    assert changes[0] == {"optim.accumulate": 8}  # 100 GiB in 7 parts fit, but 16 images do not
    assert {"model.remat": True, "optim.accumulate": 4} in changes


def test_what_is_on_is_not_tried_again(run):
    model = dataclasses.replace(run.model, remat=True)
    changes = list(candidates(dataclasses.replace(run, model=model), 20 * GIB))
    assert changes
    assert not any("model.remat" in one for one in changes)


def test_a_preset_that_splits_nothing_is_changed_with_the_axis(run):
    run.config.mesh.sharding, run.config.mesh.data = "replicated", 8
    changes = [one for one in candidates(run, 20 * GIB) if "mesh.fsdp" in one]
    run.config.mesh.sharding, run.config.mesh.data = "fsdp", -1
    assert changes
    assert all(one["mesh.sharding"] == "fsdp" for one in changes)
    assert all(one["mesh.data"] == -1 for one in changes)


def test_micro_batches_keep_an_image_on_each_chip(run):
    for one in candidates(run, 300 * GIB):
        assert 128 % (8 * one.get("optim.accumulate", 1)) == 0


def test_changes_as_flags():
    changes = {"model.remat": True, "mesh.fsdp": 8}
    assert as_flags(changes) == "--config.model.remat=True --config.mesh.fsdp=8"
