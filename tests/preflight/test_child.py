"""Compiling in another process: its crash is an error of one line, and Ctrl-C ends both at once."""

import multiprocessing
import os
import pathlib
import re
import signal
import threading
import time

import jax
import pytest

from spvit_jax.preflight import child, compile, hlo
from spvit_jax.preflight.compile import CompilerError, DoesNotFitError
from spvit_jax.preflight.topology import CHIPS, Topology

TOPOLOGY = Topology("v5e:2x2", CHIPS["v5e"], (), hosts=1, slice_name="v5e:2x2")


def crash(devices):
    os.write(2, b"*** SIGSEGV, and pages of it ***\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep(devices):
    time.sleep(600)


def test_a_crash_of_the_compiler_is_one_line_and_its_pages_are_kept():
    with pytest.raises(CompilerError) as caught:
        child.compile_steps(crash, TOPOLOGY)
    (line,) = str(caught.value).splitlines()
    found = re.fullmatch(
        r"the compiler crashed at the program: its process ended by SIGSEGV; what it wrote is in "
        r"(.+)",
        line,
    )
    assert "pages of it" in pathlib.Path(found[1]).read_text()


@pytest.fixture
def heeded():
    """Ctrl-C raises, also where nohup or a background shell has this process ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_ends_both_at_once(monkeypatch, capfd):
    monkeypatch.setattr(child, "_SECONDS_BETWEEN_LINES", 1)
    start = time.monotonic()
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        child.compile_steps(sleep, TOPOLOGY)
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()
    assert "compiling the program, 0:0" in capfd.readouterr().out


class Step:
    """A jitted step of which the compiler makes what it is given, or which it fails at."""

    def __init__(self, text="", error=None):
        self.text, self.error = text, error

    def lower(self, *arguments):
        return self

    def compile(self):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return self

    def as_text(self):
        return self.text


def compiled(step):
    return compile.compile_step("train step", step, {}, None, CHIPS["v5e"])


def test_a_text_that_cannot_be_read_is_one_line_and_kept():
    with pytest.raises(CompilerError) as caught:
        compiled(Step("a program of another compiler"))
    (line,) = str(caught.value).splitlines()
    kept = re.search(r"cannot read the compiled train step, kept in (\S+): ValueError: not", line)[
        1
    ]
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse(pathlib.Path(kept).read_text())


@pytest.mark.parametrize(
    ("words", "error", "line"),
    [
        (
            "INTERNAL: Mosaic failed\n at 3",
            CompilerError,
            "failed at the train step: INTERNAL: Mos",
        ),
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm", DoesNotFitError, "needs 20.50 GiB"),
    ],
)
def test_errors_of_the_compiler_are_one_line(words, error, line):
    with pytest.raises(error, match=line) as caught:
        compiled(Step(error=words))
    assert len(str(caught.value).splitlines()) == 1
