"""timm's names of the models that this package has under names of its own.

The names stand for architectures; what behind a dot names a set of weights (`.fb_in1k`) is ignored.
"""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """A model of this package, and the image size in pixels that a foreign name implies."""

    name: str
    image_size: int


def _sizes(ours: str, theirs: str, *image_sizes: int) -> dict[str, Alias]:
    return {theirs.format(size): Alias(ours, size) for size in image_sizes}


ALIASES: dict[str, Alias] = {
    **_sizes("deit_ti", "deit_tiny_patch16_{}", 224),
    **_sizes("deit_s", "deit_small_patch16_{}", 224),
    **_sizes("deit_b", "deit_base_patch16_{}", 224, 384),
    **_sizes("deit_ti_distilled", "deit_tiny_distilled_patch16_{}", 224),
    **_sizes("deit_s_distilled", "deit_small_distilled_patch16_{}", 224),
    **_sizes("deit_b_distilled", "deit_base_distilled_patch16_{}", 224, 384),
    # DeiT's architecture is ViT's.
    **_sizes("deit_ti", "vit_tiny_patch16_{}", 224, 384),
    **_sizes("deit_s", "vit_small_patch16_{}", 224, 384),
    **_sizes("deit_b", "vit_base_patch16_{}", 224, 384),
    **_sizes("cait_xxs24", "cait_xxs24_{}", 224, 384),
    **_sizes("cait_xxs36", "cait_xxs36_{}", 224, 384),
    **_sizes("cait_xs24", "cait_xs24_{}", 384),
    **_sizes("cait_s24", "cait_s24_{}", 224, 384),
    **_sizes("cait_s36", "cait_s36_{}", 384),
    **_sizes("cait_m36", "cait_m36_{}", 384),
    **_sizes("cait_m48", "cait_m48_{}", 448),
    **_sizes("swin_t", "swin_tiny_patch4_window7_{}", 224),
    **_sizes("swin_s", "swin_small_patch4_window7_{}", 224),
    **_sizes("swin_b", "swin_base_patch4_window7_{}", 224),
    **_sizes("swin_b", "swin_base_patch4_window12_{}", 384),
    **_sizes("swin_l", "swin_large_patch4_window7_{}", 224),
    **_sizes("swin_l", "swin_large_patch4_window12_{}", 384),
}


def resolve(name: str) -> Alias | None:
    """Returns the model that a name of timm's stands for; None if it is none of timm's."""
    return ALIASES.get(name.partition(".")[0])


def timm_name(name: str, image_size: tuple[int, int]) -> str | None:
    """Returns timm's name of a model of this package, the one of its image size if there is one.

    None where timm does not have the model.
    """
    names = [theirs for theirs, alias in ALIASES.items() if alias.name == name]
    fitting = [n for n in names if ALIASES[n].image_size == image_size[0] == image_size[1]]
    return next(iter(fitting or names), None)
