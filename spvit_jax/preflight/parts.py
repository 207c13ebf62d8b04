"""Parts of a step, such as attention or the optimizer, by the named scopes of the model's code.

JAX's name of an operation has the scopes around it, `jit(train_step)/jvp(mlp)/dot_general`; the
innermost that is known decides.
"""

from __future__ import annotations

import collections
import re

from spvit_jax.preflight.hlo import Executed, HloModule

# Named scopes of models, augmentation and training, and the part of a step that each belongs to.
SCOPES = {
    "attention": "attention",
    "windows": "attention",
    "gain": "gain and bias",
    "qkv": "qkv and projection",
    "proj": "qkv and projection",
    "mlp": "MLP",
    "norm": "norms",
    "layer_scale": "norms",
    "drop_path": "norms",
    "pos_conv": "position convolution",
    "patch_embed": "stem",
    "patch_merging": "stem",
    "heads": "heads and loss",
    "loss": "heads and loss",
    "augment": "augmentation",
    "normalize": "augmentation",
    "label_maps": "augmentation",
    "mix_tokens": "augmentation",
    "optimizer": "optimizer",
    "ema": "optimizer",
}
LOOPS, COLLECTIVES, OTHER = "loop copies", "collectives", "other"


def part_of(program: HloModule, executed: Executed) -> str:
    """Returns the part of a step that an instruction belongs to.

    A fusion belongs where its products do, else where its result does, else where most of it does;
    what has no scope is of the loop around it, whose rounds take and put their arrays.
    """
    instruction, _, loops = executed
    inner = list(program.fused_instructions(instruction))
    products = [one.operation for one in inner if one.opcode == "convolution"]
    for operation in (*products, instruction.operation):
        if part := scope_of(operation):
            return part
    counts = collections.Counter(part for one in inner if (part := scope_of(one.operation)))
    if counts:
        return counts.most_common(1)[0][0]
    for loop in reversed(loops):
        if part := scope_of(loop.operation):
            return part
    return LOOPS if loops else OTHER


def scope_of(operation: str) -> str | None:
    """Returns the part of the innermost known scope in an operation's name; None without one."""
    for name in reversed(re.split(r"[/()]", operation)):
        if name in SCOPES:
            return SCOPES[name]
    return None
