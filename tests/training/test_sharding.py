"""The mesh and the rules of placement."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from spvit_jax.errors import InputError
from spvit_jax.training import sharding


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, 4, (2, 4)), (1, 8, (1, 8))]
)
def test_mesh_shapes(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (8, 8), (0, 1), (-1, 0)])
def test_mesh_that_does_not_fit_the_devices(data, fsdp):
    with pytest.raises(InputError, match="do not make up the 8 devices"):
        sharding.make_mesh(data, fsdp)


def test_largest_dimension_that_divides_is_split():
    mesh = sharding.make_mesh(2, 4)
    tree = {
        "wide": {"kernel": jnp.zeros((6, 12))},
        "tall": {"kernel": jnp.zeros((16, 12))},
        "odd": {"bias": jnp.zeros(7)},
        "step": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(tree, mesh, "fsdp"))
    assert specs["wide"]["kernel"] == P(None, "fsdp")
    assert specs["tall"]["kernel"] == P("fsdp")
    assert specs["odd"]["bias"] == P()
    assert specs["step"] == P()
    replicated = sharding.state_shardings(tree, mesh, "replicated")
    assert all(s.spec == P() for s in jax.tree.leaves(replicated))


def test_every_leaf_needs_a_rule_and_the_preset_a_name():
    mesh = sharding.make_mesh(-1, 1)
    with pytest.raises(ValueError, match="matches 'strange'"):
        sharding.state_shardings({"strange": jnp.zeros(3)}, mesh, "fsdp")
    with pytest.raises(InputError, match="did you mean 'fsdp'"):
        sharding.state_shardings({}, mesh, "fsp")


def test_batch_must_divide():
    mesh = sharding.make_mesh(-1, 1)
    sharding.check_batch_size(32, mesh, 4)
    with pytest.raises(InputError, match="multiple of 32: 8 devices times 4 micro-batches"):
        sharding.check_batch_size(24, mesh, 4)
    assert [sharding.round_up(n, mesh) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
