"""Attention of models, computed by one compiled program each."""

import dataclasses

import jax

from spvit_jax.analysis.attention import layer_attention


def layers_of(variables, images):
    """The `LayerAttention` of each layer."""
    traced = []

    @jax.jit
    def weights(variables, images):
        traced[:] = layer_attention(variables.model(), images)
        return [layer.weights for layer in traced]

    found = weights(variables, images)
    pairs = zip(traced, found, strict=True)
    return [dataclasses.replace(layer, weights=weights) for layer, weights in pairs]


def maps_of(variables, images):
    """The `AttentionMap` of each layer."""
    maps = jax.jit(lambda v, x: tuple(v.model().attention_maps(x)))(variables, images)
    return [
        each._replace(grid=tuple(map(int, each.grid)), num_prefix=int(each.num_prefix))
        for each in maps
    ]
