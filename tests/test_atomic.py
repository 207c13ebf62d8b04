"""What is written is whole or not there, however the writing ends; old pieces are never taken."""

import os
import resource
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from spvit_jax import atomic, weights
from spvit_jax.convert import write_checkpoint
from spvit_jax.data.token_labels.store import LabelMaps
from spvit_jax.data.token_labels.store import write as write_labels
from spvit_jax.errors import InputError
from spvit_jax.interop import files
from spvit_jax.models import model_config
from spvit_jax.training import checkpoint, sharding
from tests.helpers.variables import random_variables

SMALL = {"depth": 1, "dim": 192, "image_size": 32, "num_classes": 5}
MODEL = model_config("deit_ti", **SMALL)


def test_what_a_killed_process_left_is_not_taken(tmp_path):
    program = f"""
import os, pathlib, signal
from spvit_jax import atomic
with atomic.replacing(pathlib.Path({str(tmp_path / "new")!r})) as path:
    path.mkdir()
    (path / "old").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1  # it has left something
    with atomic.replacing(tmp_path / "new") as path:
        path.mkdir()
        (path / "one").write_text("all of it")
    assert os.listdir(tmp_path / "new") == ["one"]


def test_conversion_does_not_take_what_another_left(tmp_path):
    old, new = random_variables("deit_ti", seed=0, **SMALL), random_variables("deit_ti", **SMALL)
    new = new.replace(params=jax.tree.map(lambda x: x + 1, old.params))
    checkpoint.save_variables(tmp_path / ".converted.partial", old, MODEL)
    write_checkpoint(tmp_path / "converted", new, MODEL)
    found = weights.find(tmp_path / "converted", None)
    written = found.load(MODEL, sharding.make_mesh(-1, 1))
    jax.tree.map(np.testing.assert_array_equal, written.params, new.params)


def interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    signal.raise_signal(signal.SIGINT)


def leave():
    sys.exit(1)


def fail():
    raise OSError("no space left on device")


@pytest.mark.parametrize("end", [interrupt, leave, fail])
@pytest.mark.parametrize("make", ["file", "folder"])
def test_nothing_is_left_whatever_ends_the_writing(end, make, tmp_path):
    def write():
        with atomic.replacing(tmp_path / "a" / "b" / "new") as path:
            if make == "folder":
                path.mkdir()
            (path / "half" if make == "folder" else path).write_text("half of it")
            end()

    with pytest.raises((KeyboardInterrupt, SystemExit, OSError)):
        write()
    assert os.listdir(tmp_path) == []


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def checkpoint_into(folder):
    write_checkpoint(folder / "a", random_variables("deit_ti", **SMALL), MODEL)


def safetensors_into(folder):
    files.write(folder / "a.safetensors", {"a": np.ones(1 << 20, np.float32)}, {})


def pickle_into(folder):
    files.write(folder / "a.pth", {"a": np.ones(1 << 20, np.float32)}, {})


def labels_into(folder):
    maps = (np.ones((2, 5, 14, 14)) for _ in range(200))
    write_labels(folder / "a.npy", maps, count=200, num_classes=10, source="")


@pytest.mark.parametrize("write", [checkpoint_into, safetensors_into, pickle_into, labels_into])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(write, tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, most))  # bytes in a file
    try:
        with pytest.raises(InputError, match=r"cannot write .*/new/a") as error:
            write(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_labels_are_replaced_together_with_their_facts(tmp_path):
    with pytest.raises(InputError, match="no label map"):
        write_labels(tmp_path / "a.npy", iter([None]), count=1, num_classes=3, source="")
    assert os.listdir(tmp_path) == []
    maps = iter([None, np.ones((2, 1, 1, 1)), None])
    write_labels(tmp_path / "a.npy", maps, count=3, num_classes=3, source="")
    read = LabelMaps(tmp_path / "a.npy").fetch(np.arange(3), np.array([2, 1, 0]))
    np.testing.assert_array_equal(read[:, :, 0, 0, 0], [[20, 2], [1, 1], [20, 0]])
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npy"]
