"""Names of topologies, and the facts behind them."""

import importlib.util
import math
import re
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from spvit_jax.errors import InputError
from spvit_jax.preflight import libtpu
from spvit_jax.preflight.topology import CHIPS, get_topology
from tests.helpers import REPOSITORY
from tests.helpers.tpu_compiler import needs_libtpu


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "hosts"),
    [
        ("v5e:1x1", 1, 1),
        ("v5e:4x4", 16, 4),
        ("v5e:16x16", 256, 64),
        ("v5p:2x2x2", 8, 2),
        ("v6e:4x4", 16, 4),
        ("v4:2x2x2", 8, 2),  # one device per chip, not per core
        ("v5p:4x4x12", 192, 48),
        ("tpu7x:2x2x2", 16, 2),  # two devices per chip
    ],
)
def test_topologies(name, count, hosts):
    libtpu.prepare()
    topology = get_topology(name)
    assert (len(topology.devices), topology.hosts) == (count, hosts)
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    assert topology.chips == math.prod(sides)
    assert topology.chip.name == name.partition(":")[0]


def test_the_compiler_is_the_one_that_jax_is_made_for():
    """With a later one, jaxlib cannot read all programs."""
    (required,) = re.findall(
        r"^libtpu==(.+)$", (REPOSITORY / "requirements-tpu.txt").read_text(), re.MULTILINE
    )
    (wanted,) = [Requirement(line) for line in requires("jax") if line.startswith("libtpu")]
    assert wanted.specifier.contains(required)


@needs_libtpu
def test_several_slices():
    libtpu.prepare()
    topology = get_topology("v5e:2x2", num_slices=3)
    assert topology.name == "3 slices of v5e:2x2"
    assert [device.slice_index for device in topology.devices] == [0] * 4 + [1] * 4 + [2] * 4
    assert topology.hosts == 3
    with pytest.raises(
        InputError, match=r"between slices of v4 is not known; .* take v5e, v5p, v6e"
    ):
        get_topology("v4:2x2x2", num_slices=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "v6:4x4",
            "expected one of v4, v5e, v5p, v6e, tpu7x and a shape in chips; did you mean 'v6e:4x4'",
        ),
        ("v5e:3x5", "v5e comes in 1x1, 2x2, .*; did you mean 'v5e:4x4'"),
        ("v5e:4x2", "did you mean 'v5e:2x4'"),
        ("v5e:32x32", "did you mean 'v5e:16x16'"),
        ("v5p:4x4", "more cubes of 4x4x4; did you mean 'v5p:2x2x4'"),
        ("v5p:4x4x6", "did you mean"),
        ("v5e", "did you mean 'v5e:"),
        ("", "unknown topology ''"),
    ],
)
def test_unknown_topologies(name, words):
    with pytest.raises(InputError, match=words):
        get_topology(name)


def test_facts_are_consistent():
    for chip in CHIPS.values():
        assert 0.9 * chip.hbm < chip.usable_hbm < 1.02 * chip.hbm
        # All of these chips do between 150 and 600 operations for a byte of memory, and links are
        # several times slower than memory.
        assert 150 < chip.flops / chip.hbm_bandwidth < 600
        assert 3 < chip.hbm_bandwidth / chip.ici_bandwidth < 13
        assert 0.9e9 < chip.hertz < 2.3e9


def test_missing_libtpu_is_one_clear_error(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(InputError, match=r"pip install 'spvit_jax\[tpu\]'"):
        libtpu.prepare()
