"""Records on a full disk."""

import jax.numpy as jnp
import pytest

from spvit_jax.errors import WriteError
from spvit_jax.training.report import Reporter


def test_records_that_cannot_be_written_end_the_run(tmp_path):
    reporter = Reporter(tmp_path, start_step=0, total_steps=2, batch_size=1)
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    metrics = {"loss": (jnp.ones(()), jnp.ones(()))} | {"top1": (jnp.ones(()), jnp.ones(()))}
    with pytest.raises(WriteError) as error, reporter:
        reporter.train(1, metrics, 0.1)
    assert str(error.value) == f"cannot write {path}: No space left on device"
