"""The persistent compilation cache: a second start compiles nothing, and no folder stops a run."""

import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jaxs

from spvit_jax import compilation_cache, logs

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Programs are kept however fast they compile, and JAX is set as before afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    logs.start()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jaxs.reset_cache()


def first_call(constant):
    """Events of the cache while JAX runs a program that this process has not run."""
    events = []

    def listen(name, **_):
        events.append(name.removeprefix("/jax/compilation_cache/"))

    jax.monitoring.register_event_listener(listen)
    assert float(jax.jit(lambda x: x * constant)(np.float32(2))) == 2 * constant
    jax.monitoring.unregister_event_listener(listen)
    return [event for event in events if event in ("cache_hits", "cache_misses")]


def test_a_second_start_compiles_nothing(tmp_path):
    """In a folder of one's own, in the workdir, and in that of JAX's variable."""
    own, workdir, jaxs_own = tmp_path / "own", tmp_path / "workdir", tmp_path / "jax"
    for folder, setting in ((str(own), None), (None, None), (None, str(jaxs_own))):
        for expected in ("cache_misses", "cache_hits"):
            jax.config.update("jax_compilation_cache_dir", setting)
            compilation_cache.start(folder, workdir)
            assert first_call(1.5) == [expected]
    kept = {path.parent for path in tmp_path.rglob("*-cache")}
    assert kept == {own, workdir / "compilation_cache", jaxs_own}


def test_a_command_without_a_workdir_keeps_programs_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.start(None)
    first_call(2.5)
    assert list(tmp_path.glob("spvit_jax/compilation_cache/*-cache"))


def test_off_is_off_until_the_next_start(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    compilation_cache.start("off", tmp_path)
    assert first_call(3.5) == []
    assert not list(tmp_path.iterdir())
    compilation_cache.start(None, tmp_path)
    assert first_call(3.5) == ["cache_misses"]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("{tmp_path}/file/cache", "compiled at each start"),
        ("/proc", "no compiled program is added"),
    ],
    ids=["broken", "read-only"],
)
def test_a_folder_that_cannot_be_used_is_one_warning(folder, reason, tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = folder.format(tmp_path=tmp_path)
    compilation_cache.start(folder)
    first_call(4.5)
    lines = capsys.readouterr().err.splitlines()
    assert reason in lines[0]
    assert folder in lines[0]
    # JAX's own attempt to write, where the folder can be read, is the only other line.
    assert ["Error writing" in line for line in lines[1:]] == [True] * (folder == "/proc")


def test_a_damaged_entry_is_a_warning_and_compiled_again(tmp_path, capsys):
    compilation_cache.start(str(tmp_path))
    first_call(5.5)
    for path in tmp_path.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    compilation_cache.start(str(tmp_path))
    first_call(5.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Error reading" in line
    assert str(tmp_path) in line
