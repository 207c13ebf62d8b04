"""What is written of arrays that several devices hold, and a disk that becomes full."""

import contextlib
import resource

import jax
import numpy as np
import pytest

from spvit_jax.errors import WriteError
from spvit_jax.models import model_config
from spvit_jax.training.checkpoint import Checkpoints
from tests.helpers.commands import newest_step, saved_arrays


@contextlib.contextmanager
def small_files(size):
    """Lets no file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("rows", "in_parts"), [(64, False), (16384, True)])
def test_only_large_arrays_are_written_in_parts(rows, in_parts, tmp_path, caplog):
    """A part for each device that holds the whole is a program to compile for each shape."""
    mesh = jax.make_mesh((8,), ("data",))
    whole = jax.NamedSharding(mesh, jax.P())
    state = jax.device_put(jax.random.normal(jax.random.key(0), (rows, 17)), whole)
    jax.clear_caches()
    with (
        Checkpoints(tmp_path, model_config("deit_ti"), (), keep_last=1, keep_best=1) as checkpoints,
        jax.log_compiles(),
        caplog.at_level("WARNING", logger="jax"),
    ):
        checkpoints.save(1, {"model": state})
    compiled = [text for text in caplog.messages if text.startswith("Compiling jit(")]
    assert bool(compiled) == in_parts
    (saved,) = saved_arrays(tmp_path, 1).values()
    np.testing.assert_array_equal(saved, state)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    model = model_config("deit_ti")
    with Checkpoints(tmp_path, model, (), keep_last=1, keep_best=1) as checkpoints:
        checkpoints.save(1, {"model": jax.random.normal(jax.random.key(1), (100_000,))})
        checkpoints.wait()
        with small_files(100_000):
            checkpoints.save(2, {"model": jax.random.normal(jax.random.key(2), (100_000,))})
            with pytest.raises(WriteError) as error:
                checkpoints.wait()
    words = str(error.value)
    assert words.startswith(f"a checkpoint in {tmp_path} cannot be written: File too large; the ")
    assert "last one is of step 1" in words
    assert newest_step(tmp_path) == 1
    (saved,) = saved_arrays(tmp_path, 1).values()
    np.testing.assert_array_equal(saved, jax.random.normal(jax.random.key(1), (100_000,)))
    # Started again, what was left of the second does not stand in the way.
    with Checkpoints(tmp_path, model, (), keep_last=1, keep_best=1) as checkpoints:
        checkpoints.save(2, {"model": jax.random.normal(jax.random.key(2), (100_000,))})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
