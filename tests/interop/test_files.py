"""Files of weights: what is read from them, and what is refused."""

import argparse
import contextlib
import json
import os
import pathlib
import pickle
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch

from spvit_jax.errors import InputError
from spvit_jax.interop import files, pickles

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


class CfgNode(dict):
    """As yacs has it: a dictionary with attributes of its own."""

    def __init__(self, values):
        super().__init__(values)
        self.__dict__["__immutable__"] = True


def with_yacs(save_it):
    """Saves while there is a module `yacs.config`, which reading does without."""
    CfgNode.__module__ = "yacs.config"
    CfgNode.__qualname__ = "CfgNode"
    module = types.SimpleNamespace(CfgNode=CfgNode)
    sys.modules["yacs"], sys.modules["yacs.config"] = types.SimpleNamespace(config=module), module
    try:
        save_it()
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]


@pytest.mark.parametrize("new", [True, False])
def test_settings_of_any_usual_kind_beside_the_weights_are_let_through(tmp_path, new):
    """Numbers of NumPy, paths and Swin's yacs node; they come as nothing that could be run."""
    settings = {
        "lr": np.float64(1e-3),
        "epochs": np.int64(300),
        "betas": np.array([0.9, 0.999]),
        "output": pathlib.Path("/a/b"),
        "pure": pathlib.PureWindowsPath("c:/a"),
        "config": CfgNode({"MODEL": CfgNode({"NAME": "swin", "DEPTHS": [2, 2]})}),
    }
    content = {"model": WEIGHTS, "args": argparse.Namespace(**settings), **settings}
    path = tmp_path / "a.pth"
    with_yacs(lambda: save(path, content, _use_new_zipfile_serialization=new))
    np.testing.assert_array_equal(files.read(path).state_dict["head.bias"], [1, 1])
    kinds = {type(value) for value in pickles.read(path)["args"].__dict__.values()}
    assert not kinds & {type(value) for value in settings.values()}


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


class Schedule:
    """What somebody's training may have saved beside the weights."""


def test_a_refusal_gives_the_line_that_saves_the_tensors_alone(tmp_path):
    path = save(tmp_path / "it's.pth", {"model": WEIGHTS, "ema": AVERAGE, "schedule": Schedule()})
    with pytest.raises(InputError, match=r"test_files\.Schedule to be run") as error:
        files.read(path)
    line = str(error.value)[str(error.value).index("import torch") :]
    assert "\n" not in line
    exec(line, {})
    saved = files.read(tmp_path / "tensors.pth")
    assert saved.has_average
    np.testing.assert_array_equal(saved.state_dict["head.bias"], [2, 2])


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.bin", "weights"])
def test_a_file_is_known_by_its_content(tmp_path, kind, name):
    path = tmp_path / name
    if kind == "safetensors":
        safetensors.torch.save_file(WEIGHTS, path)
    else:
        save(path, {"state_dict": WEIGHTS}, _use_new_zipfile_serialization=kind == "zip")
    assert files.is_file_of_weights(path)
    assert files.read(path).state_dict.keys() == {"head.weight", "head.bias"}


NAMES = ["model.safetensors", "pytorch_model.bin", "model.bin"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_a_hub_is_read(tmp_path, name):
    (tmp_path / "config.json").write_text('{"architecture": "deit_small_patch16_224"}')
    assert not files.is_file_of_weights(tmp_path)
    path = tmp_path / name
    safetensors.torch.save_file(WEIGHTS, path) if "safe" in name else save(path, WEIGHTS)
    assert files.is_file_of_weights(tmp_path)
    assert files.read(tmp_path).state_dict["head.weight"][1, 2] == 5


def sharded(folder, kind):
    """Weights split over two files, as hubs have them, and the path of their index."""
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    parts = [f"{stem}-0000{index}-of-00002.{suffix}" for index in (1, 2)]
    weight_map = dict(zip(WEIGHTS, parts, strict=True))
    for name, part in weight_map.items():
        one = {name: WEIGHTS[name]}
        path = folder / part
        safetensors.torch.save_file(one, path) if suffix != "bin" else save(path, one)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_by_their_index(tmp_path, kind):
    index = sharded(tmp_path, kind)
    whole, _, *_ = files.read(save(tmp_path / "whole.pth", WEIGHTS))
    for path in (index, tmp_path):
        state_dict = files.read(path).state_dict
        assert state_dict.keys() == whole.keys()
        for name, array in whole.items():
            np.testing.assert_array_equal(state_dict[name], array)


def lacking_file(index):
    (index.parent / "model-00002-of-00002.safetensors").unlink()


def lacking_name(index):
    one, other = sorted(index.parent.glob("*.safetensors"))
    shutil.copy(one, other)


def elsewhere(index):
    index.write_text(json.dumps({"weight_map": {"head.weight": "../secret\x1b[2J.bin"}}))


def itself(index):
    index.write_text(json.dumps({"weight_map": {"head.weight": index.name}}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lacking_file, r"cannot read .*00002-of-00002\.safetensors: No such file"),
        (lacking_name, r"00002\.safetensors lacks module\.head\.bias"),
        (elsewhere, r"names \.\./secret\\x1b\[2J\.bin; expected a file in the same folder"),
        (itself, r"is damaged or not a file of PyTorch weights"),
        (lambda index: index.write_text('{"weight_map": [1]}'), r"is no index of weights"),
        (lambda index: index.write_text("{" * 100_000), r"is no index of weights"),
    ],
)
def test_an_index_that_does_not_fit_is_one_clear_error(tmp_path, spoil, words):
    index = sharded(tmp_path, "safetensors")
    spoil(index)
    with pytest.raises(InputError, match=words):
        files.read(index)


@contextlib.contextmanager
def at_most(seconds):
    def stop(number, frame):
        raise TimeoutError(f"still waiting after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["pipe", "pipe.pth", "pipe.safetensors"])
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert files.is_file_of_weights(tmp_path / name)
    with at_most(10), pytest.raises(InputError, match="is a pipe, a device or a folder"):
        files.read(tmp_path / name)


def quantized():
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def expanded(dtype):
    """A few bytes that claim to be the head of 10⁸ classes."""
    return torch.zeros(1, dtype=dtype).expand(10**8, 384)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (quantized, r"quantized \(qint8\)"),
        (lambda: torch.eye(3).to_sparse(), "head.weight sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "head.weight sparse_csr"),
        (lambda: torch.empty(10**9, 10**6, device="meta"), "head.weight on the meta device"),
        (lambda: torch.ones(2, 3).to(torch.float8_e4m3fn), "head.weight float8_e4m3fn"),
        (lambda: torch.ones(2, 3, dtype=torch.complex64).conj(), "head.weight complex64"),
        (
            lambda: expanded(torch.float32),
            "head.weight 100000000×384, of which 1 numbers are stored",
        ),
        (
            lambda: expanded(torch.float16),
            "head.weight 100000000×384, of which 1 numbers are stored",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path, make, words):
    path = save(tmp_path / "a.pth", {"state_dict": WEIGHTS | {"module.head.weight": make()}})
    with pytest.raises(InputError, match=words):
        files.read(path)


def test_fp8_and_complex_numbers_in_safetensors_are_refused(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"a": torch.ones(2).to(dtype)}, path)
        with pytest.raises(InputError, match="has tensors that cannot be read"):
            files.read(path)


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
        ("a.bin", lambda path: path.write_text("version https://git-lfs.x"), "git lfs pull"),
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
    with pytest.raises(InputError, match=r"pip install 'spvit_jax\[torch\]'"):
        files.read(path)
