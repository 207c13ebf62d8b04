"""Files of weights: what is read from them, and what is refused."""

import argparse
import os
import pickle
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from spvit_jax.errors import InputError
from spvit_jax.interop import files

WEIGHTS = {"module.head.weight": torch.arange(6.0).reshape(2, 3), "module.head.bias": torch.ones(2)}
AVERAGE = {name: 2 * value for name, value in WEIGHTS.items()}


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("key", ["state_dict", "model", None])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.pt"])
def test_weights_are_found_wherever_they_are(tmp_path, key, name):
    path = save(tmp_path / name, WEIGHTS if key is None else {key: WEIGHTS, "epoch": 3})
    state_dict, note, is_average, has_average = files.read(path)
    assert (note, is_average, has_average) == (None, False, False)
    assert state_dict.keys() == {"head.weight", "head.bias"}
    np.testing.assert_array_equal(state_dict["head.weight"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_the_moving_average_is_taken_unless_the_weights_are_asked_for(tmp_path, key):
    def read(path, **choice):
        state_dict, _, is_average, has_average = files.read(path, **choice)
        return state_dict["head.bias"][0], is_average, has_average

    path = save(tmp_path / "a.pth", {"state_dict": WEIGHTS, key: AVERAGE})
    assert read(path) == read(path, weights="ema") == (2, True, True)
    assert read(path, weights="model") == (1, False, True)
    alone = save(tmp_path / "b.pth", {key: AVERAGE})
    assert read(alone) == (2, True, True)
    with pytest.raises(InputError, match="nothing but a moving average"):
        read(alone, weights="model")
    without = save(tmp_path / "c.pth", {"model": WEIGHTS})
    assert read(without) == read(without, weights="model") == (1, False, False)
    with pytest.raises(InputError, match=r"no moving average \(it has model\)"):
        read(without, weights="ema")


def test_the_authors_command_line_beside_the_weights_is_let_through(tmp_path):
    content = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1e-3, model="spvit")}
    for new in (True, False):
        path = save(tmp_path / f"{new}.pth", content, _use_new_zipfile_serialization=new)
        assert len(files.read(path)[0]) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_becomes_single(tmp_path, dtype, suffix):
    path = tmp_path / f"a{suffix}"
    weights = {"a": torch.tensor([0.5, 1.25], dtype=dtype)}
    save(path, weights) if suffix == ".pth" else safetensors.torch.save_file(weights, path)
    array = files.read(path)[0]["a"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [0.5, 1.25])


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    state_dict = {"a": np.arange(3, dtype=np.float32), "n": np.zeros((), np.int64)}
    files.write(path, state_dict, {"family": "ViTConfig", "image_size": [3, 4]})
    again, note, *_ = files.read(path)
    assert note == {"family": "ViTConfig", "image_size": [3, 4]}
    assert {k: (v.dtype, v.tobytes()) for k, v in again.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in state_dict.items()
    }
    with pytest.raises(InputError, match="exists; choose another --output"):
        files.write(path, state_dict, {})
    assert os.listdir(path.parent) == [path.name]


def test_only_known_kinds_of_files_are_written(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.safetensors or \.pth"):
        files.write(tmp_path / "a.npz", {}, {})


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_malicious_pickle_is_refused(tmp_path, kind):
    path, trace = tmp_path / "a.pth", tmp_path / "was-run"
    content = {"state_dict": WEIGHTS, "extra": Bomb(trace)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        save(path, content, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InputError, match=r"is refused: it asks for posix\.mkdir to be run"):
        files.read(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if kind != "plain" else pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have worked


def truncated(path):
    data = save(path, {"state_dict": WEIGHTS}).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def truncated_safetensors(path):
    safetensors.torch.save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a.pth", lambda path: None, "No such file"),
        ("a.pth", truncated, "is damaged or not a file of PyTorch weights"),
        ("a.safetensors", truncated_safetensors, "is damaged or not a safetensors file"),
        ("a.pth", lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page"),
        ("a.safetensors", lambda path: path.write_text("<html>"), "is a web page"),
        ("a.pth", lambda path: path.write_bytes(b""), "is damaged"),
        ("a.pth", lambda path: save(path, {"epoch": 3}), r"has no weights: .* it has epoch"),
        ("a.pth", lambda path: save(path, [1, 2]), "holds list; expected a dictionary"),
    ],
)
def test_what_is_not_weights_is_one_clear_error(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(InputError, match=words):
        files.read(tmp_path / name)


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pth", WEIGHTS)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install torch"):
        files.read(path)
