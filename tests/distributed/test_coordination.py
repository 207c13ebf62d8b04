"""The one place that reaches into JAX's private modules, and what it relies on there."""

import re

import jax
import pytest
from jax._src import clusters
from jax._src import distributed as jax_distributed
from jax._src.lib import _jax

from spvit_jax.distributed import coordination
from tests.helpers import REPOSITORY


def test_the_private_names_are_those_of_jax_0_10():
    """With another JAX look whether there is a public way to the key-value store by now."""
    assert jax.__version__.startswith("0.10.")
    state = jax_distributed.global_state
    assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)
    client = _jax.DistributedRuntimeClient
    for method in ("key_value_set", "blocking_key_value_get", "key_value_dir_get"):
        assert callable(getattr(client, method))


def test_no_other_file_reaches_into_jax():
    private = re.compile(r"jax\._src|from jax import _|import jaxlib")
    found = [
        path.name
        for path in (REPOSITORY / "spvit_jax").rglob("*.py")
        if private.search(path.read_text())
    ]
    assert found == ["coordination.py"]


def test_a_process_on_its_own_is_a_cluster_of_one():
    assert not coordination.is_formed()
    assert coordination.is_primary()
    assert coordination.gather("alone") == ["alone"]
    assert coordination.broadcast("alone") == "alone"
    assert coordination.rank_and_size() == (0, 1)


def test_a_pod_is_detected_as_jax_does_it(monkeypatch):
    """Before its cluster is formed; elsewhere it is said that there is none."""
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [])
    with pytest.raises(ValueError, match="names no other processes"):
        coordination.detect(1)

    class Pod(clusters.ClusterEnv):
        is_env_present = classmethod(lambda cls: True)
        get_process_count = classmethod(lambda cls: 4)
        get_process_id = classmethod(lambda cls: 3)

        @classmethod
        def get_coordinator_address(cls, timeout_secs, override_coordinator_port):
            return f"worker-0:{timeout_secs}"

    assert coordination.detect(7) == ("worker-0:7", 4, 3)
