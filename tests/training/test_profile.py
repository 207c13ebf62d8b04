"""Profiles that somebody asks for while a run goes on."""

import os

import jax.numpy as jnp
import pytest

from spvit_jax.preflight.topology import CHIPS
from spvit_jax.training.profile import Profiler
from spvit_jax.training.utilization import PEAK_FLOPS


def take(profiler, steps):
    """Takes steps, as the loop does; returns after which of them a trace was written."""
    written = []
    for step in steps:
        with profiler.step(step):
            jnp.ones(()).block_until_ready()
        if profiler.ends_at(step + 1):
            profiler.end()
            written.append(step + 1)
    return written


def test_touching_a_file_asks_for_a_trace(tmp_path):
    request = tmp_path / "profile"
    request.touch()  # before this start: answered then
    with Profiler(tmp_path, start=None, steps=2) as profiler:
        profiler.look()
        assert take(profiler, range(3)) == []
        for when in (1e9, 2e9):
            os.utime(request, (when, when))
            profiler.look()
            begin = 3 if when == 1e9 else 7
            assert take(profiler, range(begin, begin + 4)) == [begin + 2]
    folders = sorted(path.name for path in tmp_path.glob("plugins/profile/*"))
    assert folders == ["step_3-process_0", "step_7-process_0"]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, log, caplog):
    (tmp_path / "plugins").touch()
    log.propagate = True
    with Profiler(tmp_path, start=0, steps=1) as profiler:
        assert take(profiler, range(2)) == [1]
    assert "warning: the profile cannot be written: " in caplog.text


def test_a_run_that_ends_in_a_trace_writes_it(tmp_path):
    with Profiler(tmp_path, start=1, steps=5) as profiler:
        take(profiler, range(3))
    assert len(list(tmp_path.glob("plugins/profile/step_1-process_0/*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    ("chip", "kind"),
    [("v4", "TPU v4"), ("v5e", "TPU v5 lite"), ("v5p", "TPU v5"), ("v6e", "TPU v6 lite")],
)
def test_the_peaks_are_preflights(chip, kind):
    assert PEAK_FLOPS[kind] == CHIPS[chip].flops
