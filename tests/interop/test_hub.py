"""Weights by names of the hub: huggingface_hub itself, against a server on the loopback."""

import json
import shutil
import sys

import pytest

from spvit_jax.errors import InputError
from spvit_jax.interop import hub
from tests.helpers.hub_server import serving


@pytest.fixture
def repositories(tmp_path):
    """The folder of a hub: one repository with weights, one split in two, one with many files."""
    root = tmp_path / "hub"
    contents = {
        "timm/deit": {
            "model.safetensors": b"1" * 100,
            "config.json": b"{}",
            "pytorch_model.bin": b"2",
        },
        "us/split": {
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
            ).encode(),
            "model-1.safetensors": b"first",
            "model-2.safetensors": b"second",
        },
        "us/many": {"one.pth": b"1", "old/two.pth": b"2"},
    }
    for repository, files in contents.items():
        for name, content in files.items():
            path = root / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    """The hub's address and what is asked of it; its cache is the test's own."""
    import huggingface_hub.constants as constants
    from huggingface_hub import hf_api

    with serving(repositories) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        yield address, requests


@pytest.mark.usefixtures("server")
def test_a_repository_gives_its_weights():
    path = hub.download("hf:timm/deit")
    assert path.name == "model.safetensors"
    assert path.read_bytes() == b"1" * 100
    assert hub.download("hf:timm/deit/pytorch_model.bin").read_bytes() == b"2"
    assert hub.download("hf:us/many@main/old/two.pth").read_bytes() == b"2"


@pytest.mark.usefixtures("server")
def test_all_parts_of_split_weights_come():
    index = hub.download("hf:us/split")
    assert index.name == "model.safetensors.index.json"
    assert [(index.parent / f"model-{part}.safetensors").read_bytes() for part in (1, 2)] == [
        b"first",
        b"second",
    ]


def test_the_cache_is_used(server, monkeypatch):
    _, requests = server
    path = hub.download("hf:timm/deit")
    requests.clear()
    assert hub.download("hf:timm/deit") == path
    assert not [request for request in requests if request[0] == "GET" and "resolve" in request[1]]
    # Without a network, what is there is taken.
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert hub.download("hf:timm/deit").read_bytes() == b"1" * 100
    with pytest.raises(InputError, match="without a network, download the files elsewhere"):
        hub.download("hf:us/many/one.pth")


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:deit", "'hf:deit' is no name on the hub; expected hf:OWNER/REPO or with /FILE"),
        ("hf:timm/nothing", "there is no such repository, or it is private: set HF_TOKEN"),
        ("hf:timm/deit/x.bin", "the repository has no such file; it has config.json, model."),
        ("hf:us/many", "which file has the weights? The repository has old/two.pth, one.pth; name"),
    ],
)
def test_what_is_not_there_is_one_line(name, message):
    with pytest.raises(InputError) as error:
        hub.download(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("server")
def test_a_disk_without_room_is_said_before_the_download(monkeypatch):
    few = shutil.disk_usage(".")._replace(free=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: few)
    with pytest.raises(
        InputError, match=r"needs 1.02e-07 GB in .*, which has 5e-08 GB left; make "
    ):
        hub.download("hf:timm/deit")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'spvit_jax\[hub\]'"):
        hub.download("hf:timm/deit")
