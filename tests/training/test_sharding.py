"""The mesh and the rules of placement."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spvit_jax import plan
from spvit_jax.config import base, resolve
from spvit_jax.data.pipeline import BatchShard
from spvit_jax.errors import InputError
from spvit_jax.models.naming import named_leaves
from spvit_jax.preflight import report as preflight_report
from spvit_jax.preflight.topology import CHIPS, Topology
from spvit_jax.training import report, sharding
from spvit_jax.training.optimizer import make_optimizer
from spvit_jax.training.run import DataSize
from tests.helpers.configs import digits


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


def fake(number, slice_index=None, kind="cpu"):
    """As much of a device as its place in a mesh depends on."""
    return types.SimpleNamespace(
        id=number, slice_index=slice_index, device_kind=kind, platform="cpu", process_index=0
    )


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_data_axis_runs_over_slices_and_fsdp_within(fsdp):
    devices = [fake(number, slice_index=number % 3) for number in range(12)]
    arranged = sharding._arrange(devices, 12 // fsdp, fsdp)
    assert arranged.shape == (12 // fsdp, fsdp)
    slices = np.vectorize(lambda device: device.slice_index)(arranged)
    assert (slices == slices[:, :1]).all()  # a row, over which parameters are split, is in one
    assert slices[:, 0].tolist() == sorted(slices[:, 0])  # and a slice's rows are together
    assert len({device.id for device in arranged.flat}) == 12


@pytest.mark.parametrize(
    ("sizes", "fsdp", "words"),
    [((4, 4), 8, "the 2 slices, which have 4, 4"), ((4, 2), 2, "the 2 slices, which have 4, 2")],
)
def test_mesh_that_does_not_fit_the_slices(sizes, fsdp, words):
    owners = [number for number, size in enumerate(sizes) for _ in range(size)]
    devices = [fake(number, slice_index=owner) for number, owner in enumerate(owners)]
    with pytest.raises(InputError, match=words):
        sharding.make_mesh(-1, fsdp, devices)


def test_parts_of_a_batch_are_those_of_the_own_devices():
    """As on a v5e, where a process's chips are a square of the mesh and not a row."""
    owners = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    devices = np.vectorize(lambda owner: types.SimpleNamespace(process_index=owner))(owners)
    mesh = types.SimpleNamespace(devices=devices, size=8)
    assert sharding.local_parts(mesh) == ((0, 1, 4, 5), 8)
    rows = BatchShard(*sharding.local_parts(mesh)).ordinals(np.int64(2), 16)
    assert rows.numpy().tolist() == [32, 33, 34, 35, 40, 41, 42, 43]


def test_moments_and_averages_lie_where_their_parameters_do():
    mesh = sharding.make_mesh(2, 4)
    model = {"kernel": jnp.zeros((16, 12)), "bias": jnp.zeros(12), "pos_embed": jnp.zeros((1, 8))}
    for name in ("adamw", "lamb", "sgd"):
        config = base()
        config.optim.name = name
        moments = make_optimizer(resolve(config, num_examples=1024)).init(model)
        placed = sharding.state_shardings({"model": model, "opt_state": moments}, mesh, "fsdp")
        own = {key: place.spec for key, place in placed["model"].items()}
        assert own == {"kernel": P("fsdp"), "bias": P("fsdp"), "pos_embed": P(None, "fsdp")}
        followed = [
            place.spec == own[name.rpartition("/")[2]]
            for name, place in named_leaves(placed["opt_state"]).items()
            if name.rpartition("/")[2] in own
        ]
        assert len(followed) == (3 if name == "sgd" else 6)
        assert all(followed)


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


@pytest.mark.parametrize(
    ("shape", "fsdp", "part"),
    [
        ((12, 10), 8, (3, 5)),  # 4 × 2
        ((7, 7, 3, 4), 8, (7, 7, 3, 1)),  # 4, and twice the same
        ((6,), 4, (6,)),  # a vector
        ((7, 9), 8, (7, 9)),
        ((2, 6, 2), 8, (1, 3, 1)),  # 2 × 2 × 2
    ],
)
def test_where_no_dimension_divides_several_are_split_as_far_as_they_go(shape, fsdp, part):
    mesh = sharding.make_mesh(-1, fsdp)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    place = sharding.state_shardings({"kernel": array}, mesh, "fsdp")["kernel"]
    shards = jax.device_put(array, place).addressable_shards
    assert {shard.data.shape for shard in shards} == {part}
    assert [shard.device for shard in shards] == list(mesh.devices.flat)
    for shard in shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])
    covered = {str(shard.index) for shard in shards}
    assert len(covered) == array.size / np.prod(part)


def test_what_is_not_split_is_said_before_the_first_step(caplog):
    """By training and by preflight: the bytes that arrays take on a device."""
    config = digits("spvit")
    config.model.update({"depth": 1, "spatial_layers": 0, "dim": 36})
    config.mesh.fsdp = 8
    topology = Topology("v5e:2x4", CHIPS["v5e"], jax.devices(), 2, "v5e:2x4")
    run = plan.training_run(config, DataSize(1297, 500, 10))
    state = run.abstract
    split, rest = sharding.bytes_held(state, run.mesh)
    parts = [
        np.empty(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(state)
    ]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert split + rest == sum(part.nbytes for part in parts)
    assert 0 < rest < split
    assert 8 * split + rest < whole < 8 * (split + rest)

    words = f"{split / 1e6:,.1f} split by 8, {rest / 1e6:,.1f} by less or not at all"
    assert words in preflight_report.describe(run, topology)
    with caplog.at_level("INFO", "spvit_jax"):
        report.summarize(run)
    assert words in caplog.text


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
