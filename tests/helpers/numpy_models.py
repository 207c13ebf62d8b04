"""The columnar family once more, in NumPy float64 and straight from the papers' formulas.

Nothing here is shared with the package: loops where it has tables, pairs where it has offsets,
explicit sums where it has convolutions. Parameters come as a flat dictionary of names.
"""

import math

import numpy as np
from scipy.special import erf


def layer_norm(x, p, name, eps):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * p[f"{name}/scale"] + p[f"{name}/bias"]


def batch_norm(x, p, stats, name):
    mean, var = stats[f"{name}/mean"], stats[f"{name}/var"]
    return (x - mean) / np.sqrt(var + 1e-5) * p[f"{name}/scale"] + p[f"{name}/bias"]


def linear(x, p, name):
    y = x @ p[f"{name}/kernel"]
    return y + p[f"{name}/bias"] if f"{name}/bias" in p else y


def conv(x, kernel, stride, pad):
    """Convolves x [B, H, W, I] with kernel [k, k, I, O], output pixel by output pixel."""
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = (x.shape[1] - k) // stride + 1
    columns = (x.shape[2] - k) // stride + 1
    out = np.empty((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.einsum("bklc,klcd->bd", window, kernel)
    return out


def pairwise_gain(w1, b1, w2, b2, grid, extent=None):
    """SP-SA's gain [H, N, N], one pair of patches after the other."""
    h, w = grid
    gain = np.empty((w1.shape[0], h * w, h * w))
    for i in range(h * w):
        for j in range(h * w):
            dx, dy = j % w - i % w, j // w - i // w
            if extent is not None:
                dx, dy = dx * extent / w, dy * extent / h
            hidden = np.maximum(w1 @ np.array([dx, dy], np.float64) + b1, 0)
            gain[:, i, j] = (w2 * hidden).sum(-1) + b2
    return gain


def neighbourhood(grid, radius, num_prefix):
    """MaiT's mask [P+N, P+N], one pair after the other."""
    h, w = grid
    total = num_prefix + h * w
    mask = np.ones((total, total), bool)
    for i in range(h * w):
        for j in range(h * w):
            near = abs(i // w - j // w) <= radius[0] and abs(i % w - j % w) <= radius[1]
            mask[num_prefix + i, num_prefix + j] = near
    return mask


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def block(x, p, config, layer, grid, num_prefix):
    name = f"blocks/{layer}"
    heads, dim = config.num_heads, config.dim
    d = dim // heads
    y = layer_norm(x, p, f"{name}/norm1", config.norm_eps)
    qkv = linear(y, p, f"{name}/attn/qkv")
    q, k, v = qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :]
    masked = config.masked_per_layer()[layer]
    out = np.empty_like(q)
    for head in range(heads):
        columns = slice(head * d, (head + 1) * d)
        scores = np.einsum("bnd,bmd->bnm", q[..., columns], k[..., columns]) / math.sqrt(d)
        if layer < config.spatial_layers:
            w = [p[f"{name}/attn/prior/{key}"] for key in ("w1", "b1", "w2", "b2")]
            gain = pairwise_gain(*w, grid, config.prior_extent)[head]
            gain = np.pad(gain, ((num_prefix, 0), (num_prefix, 0)), constant_values=1.0)
            scores = scores * gain
        if head in masked:
            near = neighbourhood(grid, config.mask_shape, num_prefix)
            far = 0.0 if config.mask_kind == "soft" else -np.inf
            scores = np.where(near, scores, far)
        out[..., columns] = softmax(scores) @ v[..., columns]
    branch = linear(out, p, f"{name}/attn/proj")
    if config.layer_scale is not None:
        branch = branch * p[f"{name}/scale1/gamma"]
    x = x + branch / config.skip_lam

    y = linear(layer_norm(x, p, f"{name}/norm2", config.norm_eps), p, f"{name}/mlp/fc1")
    branch = linear(y * (1 + erf(y / math.sqrt(2))) / 2, p, f"{name}/mlp/fc2")
    if config.layer_scale is not None:
        branch = branch * p[f"{name}/scale2/gamma"]
    x = x + branch / config.skip_lam

    if config.pos_conv:
        kernel, bias = p[f"{name}/pos_conv/kernel"], p[f"{name}/pos_conv/bias"]
        image = x[:, num_prefix:].reshape(x.shape[0], *grid, dim)
        channels = [slice(c, c + 1) for c in range(dim)]
        position = [conv(image[..., c], kernel[..., c], 1, 1) for c in channels]
        position = (np.concatenate(position, -1) + bias).reshape(x.shape[0], -1, dim)
        x = np.concatenate([x[:, :num_prefix], x[:, num_prefix:] + position], 1)
    return x


def logits(images, params, stats, config):
    """Evaluation logits [B, C] of images [B, H, W, 3]."""
    p, x = params, images
    if config.stem_width:
        for i, (stride, pad) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
            x = conv(x, p[f"patch_embed/conv{i}/kernel"], stride, pad)
            x = np.maximum(batch_norm(x, p, stats, f"patch_embed/bn{i}"), 0)
    kernel = p["patch_embed/proj/kernel"]
    x = conv(x, kernel, kernel.shape[0], 0) + p["patch_embed/proj/bias"]
    grid = x.shape[1:3]
    x = x.reshape(x.shape[0], -1, config.dim)

    names = ["cls_token"] + (["dist_token"] if config.distilled else [])
    prefix = np.concatenate([np.repeat(p[name], len(x), 0) for name in names], 1)
    late = config.class_token_layer
    late = config.spatial_layers if late is None else late
    x = (x if late else np.concatenate([prefix, x], 1)) + p["pos_embed"]
    for layer in range(config.depth):
        if layer == late > 0:
            x = np.concatenate([prefix, x], 1)
        num_prefix = len(names) if layer >= late else 0
        x = block(x, p, config, layer, grid, num_prefix)
    x = layer_norm(x, p, "norm", config.norm_eps)

    result = linear(x[:, 0], p, "head")
    if config.distilled:
        result = (result + linear(x[:, 1], p, "dist_head")) / 2
    if config.dense_head:
        result = result + 0.5 * linear(x[:, len(names) :], p, "dense_head").max(1)
    return result
