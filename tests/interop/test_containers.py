"""What people put around their weights: taken off, said, and refused where it could be meant."""

import itertools

import numpy as np
import pytest
import torch

from spvit_jax.errors import InputError
from spvit_jax.interop import files
from spvit_jax.interop.containers import unwrap

BARE = {"blocks.0.attn.qkv.weight": torch.arange(4.0), "head.bias": torch.ones(2)}


def prefixed(prefix, weights=BARE):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def doubled(weights=BARE):
    return {name: 2 * value for name, value in weights.items()}


def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "prefix",
    [
        "".join(parts)
        for count in (1, 2, 3)
        for parts in itertools.permutations(
            ["module.", "_orig_mod.", "model.", "net.", "backbone."], count
        )
    ],
)
def test_prefixes_are_taken_off_in_any_order(prefix):
    found = unwrap({"state_dict": prefixed(prefix)}, "a.pth")
    same(found.tensors, BARE)
    assert found.changes == ["took state_dict", f"took {prefix} off the names"]


def test_a_compiled_part_of_a_model_is_renamed_in_the_middle():
    compiled = {name.replace("0.", "0._orig_mod."): value for name, value in BARE.items()}
    same(unwrap(compiled, "a.pth").tensors, BARE)


def test_a_classifier_beside_its_backbone_is_read():
    split = {"backbone.blocks.0.attn.qkv.weight": torch.arange(4.0), "head.bias": torch.ones(2)}
    same(unwrap(split, "a.pth").tensors, BARE)


@pytest.mark.parametrize(
    "keys",
    [
        *((key,) for key in ("state_dict", "model", "model_state_dict", "net", "module")),
        *((key,) for key in ("ema", "teacher", "model_ema", "state_dict_ema")),
        *(("model", "state_dict"), ("module", "net", "model"), ("ema", "module")),
    ],
)
def test_containers_are_opened_however_deep(keys):
    content = prefixed("module.")
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}}
    found = unwrap(content, "a.pth")
    same(found.tensors, BARE)
    assert found.changes[0] == f"took {'.'.join(keys)}"
    average = keys[0] in ("ema", "teacher", "model_ema", "state_dict_ema")
    assert (found.is_average, found.has_average) == (average, average)


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "teacher"])
def test_which_average_is_taken_is_known(key):
    content = {"model_state_dict": BARE, key: {"module": doubled()}}
    plain, average = (unwrap(content, "a.pth", weights=one) for one in ("model", "auto"))
    same(plain.tensors, BARE)
    same(average.tensors, doubled())
    assert (plain.is_average, plain.has_average) == (False, True)
    assert (average.is_average, average.has_average) == (True, True)


def test_the_counter_of_an_averaged_model_is_left_out():
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
    found = unwrap(averaged.state_dict(), "a.pth")
    assert found.tensors.keys() == {"weight", "bias"}
    assert found.is_average
    assert found.changes == ["took module. off the names", "left out n_averaged"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"net": BARE, "model": doubled()}, "several sets of weights: model, net; keep one"),
        (
            prefixed("module.") | prefixed("net.", doubled()),
            "several sets of weights: module.blocks.0.attn.qkv.weight and net.blocks.0.attn",
        ),
        ({"epoch\x1b[2J" + 100 * "x": 3}, r"it has epoch\\x1b\[2Jx+…$"),
    ],
)
def test_what_could_be_meant_is_asked_for(content, words):
    with pytest.raises(InputError, match=words):
        unwrap(content, "a.pth")


def test_a_dictionary_that_holds_itself_has_an_end():
    content = {"epoch": 3}
    content["model"] = content["state_dict"] = content
    with pytest.raises(InputError, match="has no weights"):
        unwrap(content, "a.pth")


def test_what_was_done_is_in_the_log(tmp_path, caplog):
    path = tmp_path / "a.pth"
    torch.save({"model_state_dict": prefixed("module._orig_mod.")}, path)
    np.testing.assert_array_equal(files.read(path).state_dict["head.bias"], [1, 1])
    assert caplog.messages == [
        f"note: {path}: took model_state_dict; took module._orig_mod. off the names"
    ]
    caplog.clear()
    torch.save(BARE, path)
    files.read(path)
    assert caplog.messages == []
