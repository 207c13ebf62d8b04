"""The run that is compiled without a machine is the one that is run."""

import jax
import numpy as np
import pytest

from spvit_jax import config as config_lib
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.crops import EvalTransform, TrainTransform
from spvit_jax.training import run as run_lib
from spvit_jax.training import sharding
from spvit_jax.training.run import DataSize
from spvit_jax.training.step import StepSettings
from tests.helpers.configs import digits


@pytest.fixture(scope="module")
def parts():
    config = digits()
    config.model.update({"depth": 2, "dim": 24, "spatial_layers": 1, "stem_width": 8})
    config.mesh.fsdp = 2
    config = config_lib.resolve(config, num_examples=1297)
    model = config_lib.model_settings(config, num_classes=10)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    size = DataSize(1297, 500, 10)
    return (
        config,
        model,
        mesh,
        run_lib.build(config, model, StepSettings.of(config, 10), mesh, size),
    )


def abstract(model, mesh, size, *, train):
    return run_lib.abstract_batch(size, model.image_shape, mesh, train=train)


def test_abstract_batches_are_those_of_the_pipeline(parts, data_dir):
    config, model, mesh, _ = parts
    source = datasets.load("digits", "train", data_dir)
    protocol = config_lib.evaluation_of(config, model.image_shape)
    train = pipeline.train_batches(
        source, TrainTransform.of(config, model.image_shape), batch_size=64, seed=0
    )
    held_out = pipeline.eval_batches(
        source, EvalTransform(model.image_shape, *protocol), batch_size=64
    )
    for batches, is_train in ((train, True), (held_out, False)):
        with batches:
            real = sharding.put_batch(next(batches), mesh)
        expected = abstract(model, mesh, 64, train=is_train)
        assert real.keys() == expected.keys()
        for name, leaf in expected.items():
            assert (real[name].shape, real[name].dtype) == (leaf.shape, leaf.dtype)
            assert real[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_lowered_from_shapes_as_from_arrays(parts):
    config, model, mesh, run = parts
    batch = abstract(model, mesh, config.data.batch_size, train=True)
    key = jax.eval_shape(lambda: run.root)
    without = run.train_step.lower(run.abstract, batch, key).as_text()
    state, arrays = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        (run.abstract, batch),
    )
    assert run.train_step.lower(state, arrays, run.root, None).as_text() == without
