"""The README's lines of Python, run as they stand there."""

import re
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.models import model_config
from spvit_jax.models.naming import named_leaves
from spvit_jax.training.checkpoint import Checkpoints
from tests.helpers import REPOSITORY
from tests.helpers.variables import random_variables

SMALL = {"depth": 2, "dim": 12, "num_heads": 3, "image_size": 16, "patch_size": 4, "num_classes": 5}


def block_with(words):
    """Returns the indented block of the README that has the words in it."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    (block,) = [textwrap.dedent(block).strip() for block in blocks if words in block]
    return block


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(12, rngs=rngs), nnx.LayerNorm(12, rngs=rngs)
        self.attn = nnx.Dict(qkv=nnx.Linear(12, 36, rngs=rngs), proj=nnx.Linear(12, 12, rngs=rngs))
        self.mlp = nnx.Dict(fc1=nnx.Linear(12, 48, rngs=rngs), fc2=nnx.Linear(48, 12, rngs=rngs))


class DeiT(nnx.Module):
    """Somebody's own module, which has the names of ours."""

    def __init__(self, rngs):
        self.patch_embed = nnx.Dict(proj=nnx.Conv(3, 12, (4, 4), strides=4, rngs=rngs))
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 12)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 17, 12)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(12, rngs=rngs), nnx.Linear(12, 5, rngs=rngs)


@pytest.mark.parametrize(
    ("name", "settings", "build"),
    [
        ("deit_ti", {}, lambda _: DeiT(nnx.Rngs(0))),
        # With BatchNorm's statistics, which are no parameters.
        ("spvit_s", {"stem_width": 4, "spatial_layers": 1}, lambda c: c.build(nnx.Rngs(0))),
    ],
)
def test_a_checkpoint_is_read_with_plain_orbax(name, settings, build, tmp_path):
    settings = SMALL | settings
    config = model_config(name, **settings)
    average = random_variables(name, seed=1, **settings)
    state = {"model": random_variables(name, **settings), "ema": average}
    with Checkpoints(tmp_path, config, (), keep_last=1, keep_best=1) as checkpoints:
        checkpoints.save(3, state)
    lines = block_with("restore_int_paths")
    assert len([line for line in lines.splitlines() if line and "import" not in line]) == 5

    path, module = str(tmp_path / "checkpoints" / "3" / "default"), build(config)
    before = named_leaves(nnx.state(module))
    exec(lines, {"path": path, "module": module})
    ours, theirs = named_leaves(nnx.state(average.model())), named_leaves(nnx.state(module))
    assert ours.keys() == theirs.keys() == before.keys()
    for leaf in ours:
        np.testing.assert_array_equal(theirs[leaf], ours[leaf], err_msg=leaf)
