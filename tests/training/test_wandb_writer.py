"""Weights & Biases, by what the writer asks of the package, which the tests do not install."""

import sys
import types

import pytest

from spvit_jax.errors import InputError
from spvit_jax.training import wandb_writer
from spvit_jax.training.wandb_writer import WandbWriter, check_installed


class Package(types.ModuleType):
    """What of wandb is used; `calls` has what it was asked for."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.problem = [], None
        self.offline, self.dir = True, "/runs/wandb/offline-run"

    def Settings(self, **settings):
        return settings

    def init(self, **settings):
        if self.problem:
            raise self.problem
        self.calls.append(settings)
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.calls.append(values)

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def package(monkeypatch):
    package = Package()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_a_run_that_goes_on_is_one_run_there(package, tmp_path):
    for step in (1, 2):
        writer = WandbWriter(tmp_path, "us/digits", {"seed": 0})
        writer.write_scalars(step, {"train/loss": 0.5})
        writer.close()
    first, *between, _, last, _ = package.calls
    assert between[:2] == [{"step": 1, "train/loss": 0.5}, "finish"]
    assert last == {"step": 2, "train/loss": 0.5}
    again = package.calls[3]
    assert first["id"] == again["id"] == (tmp_path / "wandb-id.txt").read_text()
    assert (first["entity"], first["project"], first["name"]) == ("us", "digits", tmp_path.name)
    assert (first["resume"], first["config"]) == ("allow", {"seed": 0})
    assert first["dir"] == str(tmp_path)


def test_what_keeps_it_from_starting_is_one_line(package, tmp_path):
    package.problem = package.Error("api_key not configured (no-tty)\nmore")
    with pytest.raises(InputError, match=r"not start: api_key not configured \(no-tty\); run `wan"):
        WandbWriter(tmp_path, "digits", {})


def test_without_the_package_that_is_said_at_the_start(monkeypatch):
    monkeypatch.setattr(wandb_writer.importlib.util, "find_spec", lambda name: None)
    check_installed(None)
    with pytest.raises(InputError, match=r"config.wandb is 'digits', and the package wandb is not"):
        check_installed("digits")
