"""PyTorch names of the arrays of each family: one table per family, read in both directions.

A table lists every array that a family can have; `translate.py` leaves out those that a model does
not have. Where the authors' code and timm use different names, `dialect` chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from spvit_jax.interop.layouts import (
    HEADS,
    HEADS_AS_COLUMN,
    OFFSET_TABLE,
    QK_AND_V,
    QK_AND_V_BIAS,
    SAME,
    Row,
    conv,
    linear,
    norm,
)
from spvit_jax.models import CaiTConfig, MaiTPyramidConfig, ModelConfig, SwinConfig, ViTConfig

Dialect = Literal["authors", "timm"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)


def rows_of(config: ModelConfig, dialect: Dialect) -> Iterator[Row]:
    """Yields the rows of the table of names of a model's family."""
    match config:
        case ViTConfig():
            return _vit(config, dialect)
        case CaiTConfig():
            return _cait(config)
        case SwinConfig() | MaiTPyramidConfig():
            return _pyramid(config, dialect)
    raise TypeError(f"there is no table of names for {type(config).__name__}")


def _vit(config: ViTConfig, dialect: Dialect) -> Iterator[Row]:
    """Yields the names of a ViT: DeiT's, also for MaiT; LV-ViT's and SP-ViT's as in their code."""
    scale = "ls{}.gamma" if dialect == "timm" else "gamma_{}"
    for name in ("cls_token", "dist_token", "pos_embed"):
        yield Row(name, (name,), SAME)
    for index in (1, 2, 3):
        yield from conv(f"patch_embed/conv{index}", f"patch_embed.conv{index}")
        yield from norm(f"patch_embed/bn{index}", f"patch_embed.bn{index}")
    yield from conv("patch_embed/proj", "patch_embed.proj")
    for layer in range(config.depth):
        ours, theirs = f"blocks/{layer}", f"blocks.{layer}"
        yield from _mlp_and_norms(ours, theirs)
        if layer < config.spatial_layers:
            yield from _spatial_attention(f"{ours}/attn", f"{theirs}.attn")
        else:
            yield from linear(f"{ours}/attn/qkv", f"{theirs}.attn.qkv")
        yield from linear(f"{ours}/attn/proj", f"{theirs}.attn.proj")
        yield _position_bias(ours, theirs)
        for index in (1, 2):
            yield Row(f"{ours}/scale{index}/gamma", (f"{theirs}.{scale.format(index)}",), SAME)
        yield from conv(f"{ours}/pos_conv", f"{theirs}.pos_block.proj.0")
    yield from norm("norm", "norm")
    yield from linear("head", "head")
    yield from linear("dist_head", "head_dist")
    yield from linear("dense_head", "aux_head")


def _spatial_attention(ours: str, theirs: str) -> Iterator[Row]:
    qk_and_v = (f"{theirs}.qk.weight", f"{theirs}.v.weight")
    qk_and_v_bias = (f"{theirs}.qk.bias", f"{theirs}.v.bias")
    yield Row(f"{ours}/qkv/kernel", qk_and_v, QK_AND_V)
    yield Row(f"{ours}/qkv/bias", qk_and_v_bias, QK_AND_V_BIAS)
    yield from _prior(ours, theirs)


def _prior(ours: str, theirs: str) -> Iterator[Row]:
    """Yields the names of SP-SA's prior, in other families than the authors' too."""
    yield Row(f"{ours}/prior/w1", (f"{theirs}.w1.weight",), HEADS)
    yield Row(f"{ours}/prior/b1", (f"{theirs}.w1.bias",), HEADS)
    yield Row(f"{ours}/prior/w2", (f"{theirs}.w2",), HEADS_AS_COLUMN)
    yield Row(f"{ours}/prior/b2", (f"{theirs}.b2",), SAME)


def _position_bias(ours: str, theirs: str) -> Row:
    """Returns the name of Swin's learned bias, in other families than Swin too."""
    table = f"{theirs}.attn.relative_position_bias_table"
    return Row(f"{ours}/attn/position/table", (table,), OFFSET_TABLE)


def _cait(config: CaiTConfig) -> Iterator[Row]:
    """Yields the names of a CaiT; the authors' are also timm's."""
    for name in ("cls_token", "dist_token", "pos_embed"):
        yield Row(name, (name,), SAME)
    yield from conv("patch_embed/proj", "patch_embed.proj")
    for layer in range(config.depth):
        ours, theirs = f"blocks/{layer}", f"blocks.{layer}"
        yield from _mlp_and_norms(ours, theirs)
        yield from linear(f"{ours}/attn/qkv", f"{theirs}.attn.qkv")
        yield from _prior(f"{ours}/attn", f"{theirs}.attn")
        yield from linear(f"{ours}/attn/proj", f"{theirs}.attn.proj")
        yield from linear(f"{ours}/attn/mix_scores", f"{theirs}.attn.proj_l")
        yield from linear(f"{ours}/attn/mix_weights", f"{theirs}.attn.proj_w")
        for index in (1, 2):
            yield Row(f"{ours}/scale{index}/gamma", (f"{theirs}.gamma_{index}",), SAME)
    for layer in range(config.class_layers):
        ours, theirs = f"class_blocks/{layer}", f"blocks_token_only.{layer}"
        yield from _mlp_and_norms(ours, theirs)
        for name in ("q", "k", "v", "proj"):
            yield from linear(f"{ours}/attn/{name}", f"{theirs}.attn.{name}")
        for index in (1, 2):
            yield Row(f"{ours}/scale{index}/gamma", (f"{theirs}.gamma_{index}",), SAME)
    yield from norm("norm", "norm")
    yield from linear("head", "head")
    yield from linear("dist_head", "head_dist")


def _pyramid(config: SwinConfig | MaiTPyramidConfig, dialect: Dialect) -> Iterator[Row]:
    """Yields the names of a Swin, the authors' or timm's, which a hierarchical MaiT has too.

    Patch merging begins a stage in timm, and ends the one before in the authors' code.
    """
    is_timm = dialect == "timm"
    yield Row("pos_embed", ("pos_embed",), SAME)
    yield from conv("patch_embed/proj", "patch_embed.proj")
    yield from norm("patch_norm", "patch_embed.norm")
    layer = 0
    for stage, depth in enumerate(config.depths):
        if stage > 0:
            ours = f"merges/{stage - 1}"
            theirs = f"layers.{stage if is_timm else stage - 1}.downsample"
            yield from norm(f"{ours}/norm", f"{theirs}.norm")
            yield from linear(f"{ours}/reduction", f"{theirs}.reduction")
        for index in range(depth):
            ours, theirs = f"blocks/{layer}", f"layers.{stage}.blocks.{index}"
            yield from _mlp_and_norms(ours, theirs)
            yield from linear(f"{ours}/attn/qkv", f"{theirs}.attn.qkv")
            yield from linear(f"{ours}/attn/proj", f"{theirs}.attn.proj")
            yield _position_bias(ours, theirs)
            yield from _prior(f"{ours}/attn", f"{theirs}.attn")
            for index in (1, 2):
                yield Row(f"{ours}/scale{index}/gamma", (f"{theirs}.gamma_{index}",), SAME)
            yield from conv(f"{ours}/pos_conv", f"{theirs}.pos_block.proj.0")
            layer += 1
    yield from norm("norm", "norm")
    yield from linear("head", "head.fc" if is_timm else "head")
    yield from linear("dist_head", "head_dist")


def _mlp_and_norms(ours: str, theirs: str) -> Iterator[Row]:
    yield from norm(f"{ours}/norm1", f"{theirs}.norm1")
    yield from norm(f"{ours}/norm2", f"{theirs}.norm2")
    yield from linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1")
    yield from linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2")
