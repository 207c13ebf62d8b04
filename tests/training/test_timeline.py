"""Each second of a run is that of one phase, and standing still is told from being slow."""

import jax
import jax.numpy as jnp
import pytest

from spvit_jax.training.timeline import Timeline, spread


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def compiled(seconds):
    """As JAX reports it, when it has been done."""
    jax.monitoring.record_event_duration_secs("/jax/core/compile/some_duration", seconds)


@pytest.fixture
def clock():
    return Clock()


def test_each_second_is_of_one_phase(clock):
    timeline = Timeline(clock=clock)
    with timeline:
        clock.now += 3  # start
        timeline.begin_steps(0)
        with timeline.phase("input"):
            clock.now += 2  # nothing runs yet: waited for
        clock.now += 7
        compiled(1)  # traced within
        compiled(4)  # what takes 4 of the 7 seconds, the one included
        with timeline.phase("evaluation"):
            clock.now += 5
            compiled(2)
            with timeline.phase("report"):
                clock.now += 0.5
            clock.now += 1
        with timeline.phase("checkpoint"):
            clock.now += 6
        clock.now += 0.25
        seconds = timeline.seconds()
    expected = {"start": 3, "compile": 6, "input": 2, "step": 3.25}
    expected |= {"evaluation": 4, "checkpoint": 6, "report": 0.5}
    assert seconds == pytest.approx(expected)
    assert sum(seconds.values()) == pytest.approx(clock.now - 100)


def test_input_is_waited_for_only_while_the_devices_have_nothing_to_do(clock):
    timeline = Timeline(clock=clock)
    timeline.begin_steps(0)
    timeline.follow(jnp.ones(()))
    with timeline.phase("input"):
        clock.now += 2
        timeline.wait_for_steps()  # the step ends after two of the five seconds
        clock.now += 3
    timeline.follow(jnp.ones(()))
    with timeline.phase("input"):
        clock.now += 4  # and this one goes on all the while
    assert timeline.seconds() | {"input": 3.0, "step": 6.0} == timeline.seconds()


def test_a_step_lasts_from_the_end_of_the_one_before(clock):
    """Or of what came between: an evaluation is no part of it, and waiting for input is."""
    timeline = Timeline(clock=clock)
    timeline.begin_steps(0)
    for seconds in (2, 3):
        timeline.follow(jnp.ones(()))
        clock.now += seconds
        timeline.wait_for_steps()
    with timeline.phase("evaluation"):
        clock.now += 50
    with timeline.phase("input"):
        clock.now += 4
    timeline.follow(jnp.ones(()))
    clock.now += 1
    timeline.wait_for_steps()
    assert timeline.take_step_seconds() == [2, 3, 5]
    assert timeline.take_step_seconds() == []
    assert spread([*range(1, 10), 100]) == {"median": 5.5, "p90": 100, "max": 100}
    assert spread([3]) == {"median": 3, "p90": 3, "max": 3}


def test_how_long_each_phase_may_take(clock):
    timeline = Timeline(60.0, clock=clock)
    assert timeline.activity().limit == 360
    timeline.begin_steps(7)
    clock.now += 100
    first = timeline.activity()
    assert first == ("compile", 7, 100, 360, False)
    timeline.follow(jnp.ones(()))
    timeline.wait_for_steps()
    for _ in range(3):
        timeline.follow(jnp.ones(()))
        clock.now += 1
        timeline.wait_for_steps()
    clock.now += 10
    assert timeline.activity() == ("step", 11, 10, 60, False)
    with timeline.phase("input"):
        clock.now += 20
        assert timeline.activity() == ("input", 11, 20, 60, False)
    with timeline.phase("evaluation"):
        clock.now += 20
        timeline.tick()  # a batch
        clock.now += 30
        assert timeline.activity() == ("evaluation", 11, 30, 360, False)
    with timeline.phase("checkpoint"):
        assert timeline.activity().limit == 360
    assert timeline.activity().has_saved
    for _ in range(50):  # long steps may take longer
        timeline.follow(jnp.ones(()))
        clock.now += 10
        timeline.wait_for_steps()
    assert timeline.activity().limit == 300
    assert Timeline(0.0, clock=clock).activity().limit == float("inf")
