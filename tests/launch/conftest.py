"""Pods of pretence, before their creation and with the code."""

import pytest

from tests.helpers.pod import Pod


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Folders to copy: before there is a pod, and with one that has the code."""
    before, ready = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("ready")
    Pod(before).make()
    pod = Pod(ready).copy(before)
    pod("create")
    pod("sync")
    (pod.folder / "calls").unlink()
    return before, ready


@pytest.fixture
def pod(tmp_path, templates):
    """A pod that has not been asked for yet; `pod.ready()` is there, and has the code."""
    pod = Pod(tmp_path, templates[1]).copy(templates[0])
    yield pod
    pod.end()
    assert pod.state() == (None, None) or pod.record().exists()
