"""The families once more, in NumPy float64 and straight from the papers' formulas.

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


def pairwise_bias(table, grid):
    """Swin's bias [H, N, N] of a table over (dy, dx), one pair of patches after the other."""
    h, w = grid
    bias = np.empty((table.shape[0], h * w, h * w))
    for i in range(h * w):
        for j in range(h * w):
            dx, dy = j % w - i % w, j // w - i // w
            bias[:, i, j] = table[:, dy + h - 1, dx + w - 1]
    return bias


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


def mix_heads(x, p, name):
    """CaiT's talking heads: each new head of x [B, H, n, m] is a sum of the old ones."""
    if f"{name}/kernel" not in p:
        return x
    kernel, bias = p[f"{name}/kernel"], p[f"{name}/bias"]
    heads = range(x.shape[1])
    return np.stack([sum(x[:, h] * kernel[h, g] for h in heads) + bias[g] for g in heads], 1)


def block(x, p, config, layer, grid, num_prefix):
    name = f"blocks/{layer}"
    heads, dim = config.heads_per_layer()[layer], x.shape[-1]
    skip_lam = getattr(config, "skip_lam", 1)
    d = dim // heads
    y = layer_norm(x, p, f"{name}/norm1", config.norm_eps)
    qkv = linear(y, p, f"{name}/attn/qkv")
    q, k, v = qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :]
    masked = config.masked_per_layer()[layer]
    columns = [slice(head * d, (head + 1) * d) for head in range(heads)]
    products = [np.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) for part in columns]
    scores = mix_heads(np.stack(products, 1) / math.sqrt(d), p, f"{name}/attn/mix_scores")
    if layer < config.spatial_layers:
        w = [p[f"{name}/attn/prior/{key}"] for key in ("w1", "b1", "w2", "b2")]
        gain = pairwise_gain(*w, grid, config.prior_extent)
        scores[:, :, num_prefix:, num_prefix:] *= gain
    for head in masked:
        near = neighbourhood(grid, config.mask_shape, num_prefix)
        far = 0.0 if config.mask_kind == "soft" else -np.inf
        scores[:, head] = np.where(near, scores[:, head], far)
    if layer < getattr(config, "position_bias_layers", 0):
        bias = pairwise_bias(p[f"{name}/attn/position/table"], grid)
        scores[:, :, num_prefix:, num_prefix:] += bias
    weights = mix_heads(softmax(scores), p, f"{name}/attn/mix_weights")
    out = np.concatenate([weights[:, h] @ v[..., part] for h, part in enumerate(columns)], -1)
    branch = linear(out, p, f"{name}/attn/proj")
    if config.layer_scale is not None:
        branch = branch * p[f"{name}/scale1/gamma"]
    x = x + branch / skip_lam

    y = linear(layer_norm(x, p, f"{name}/norm2", config.norm_eps), p, f"{name}/mlp/fc1")
    branch = linear(y * (1 + erf(y / math.sqrt(2))) / 2, p, f"{name}/mlp/fc2")
    if config.layer_scale is not None:
        branch = branch * p[f"{name}/scale2/gamma"]
    x = x + branch / skip_lam

    if f"{name}/pos_conv/kernel" in p:
        kernel, bias = p[f"{name}/pos_conv/kernel"], p[f"{name}/pos_conv/bias"]
        image = x[:, num_prefix:].reshape(x.shape[0], *grid, dim)
        channels = [slice(c, c + 1) for c in range(dim)]
        position = [conv(image[..., c], kernel[..., c], 1, 1) for c in channels]
        position = (np.concatenate(position, -1) + bias).reshape(x.shape[0], -1, dim)
        x = np.concatenate([x[:, :num_prefix], x[:, num_prefix:] + position], 1)
    return x


def embed(images, p):
    """Patch tokens [B, N, D] and their grid."""
    kernel = p["patch_embed/proj/kernel"]
    x = conv(images, kernel, kernel.shape[0], 0) + p["patch_embed/proj/bias"]
    return x.reshape(len(x), -1, x.shape[-1]), x.shape[1:3]


def logits(images, params, stats, config):
    """Evaluation logits [B, C] of images [B, H, W, 3]."""
    p, x = params, images
    if config.stem_width:
        for i, (stride, pad) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
            x = conv(x, p[f"patch_embed/conv{i}/kernel"], stride, pad)
            x = np.maximum(batch_norm(x, p, stats, f"patch_embed/bn{i}"), 0)
    x, grid = embed(x, p)

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


def class_block(prefix, x, p, config, layer):
    """CaiT's class attention: the prefix tokens ask, of themselves and the patches."""
    name, heads = f"class_blocks/{layer}", config.num_heads
    tokens = layer_norm(np.concatenate([prefix, x], 1), p, f"{name}/norm1", config.norm_eps)
    q = linear(tokens[:, : prefix.shape[1]], p, f"{name}/attn/q")
    k, v = (linear(tokens, p, f"{name}/attn/{key}") for key in "kv")
    d, outs = config.dim // heads, []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = np.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / math.sqrt(d)
        outs.append(softmax(scores) @ v[..., part])
    branch = linear(np.concatenate(outs, -1), p, f"{name}/attn/proj")
    prefix = prefix + branch * p[f"{name}/scale1/gamma"]
    y = linear(layer_norm(prefix, p, f"{name}/norm2", config.norm_eps), p, f"{name}/mlp/fc1")
    branch = linear(y * (1 + erf(y / math.sqrt(2))) / 2, p, f"{name}/mlp/fc2")
    return prefix + branch * p[f"{name}/scale2/gamma"]


def cait_logits(images, p, stats, config):
    """Evaluation logits [B, C] of a CaiT."""
    x, grid = embed(images, p)
    x = x + p["pos_embed"]
    for layer in range(config.depth):
        x = block(x, p, config, layer, grid, 0)
    names = ["cls_token"] + (["dist_token"] if config.distilled else [])
    prefix = np.concatenate([np.repeat(p[name], len(x), 0) for name in names], 1)
    for layer in range(config.class_layers):
        prefix = class_block(prefix, x, p, config, layer)
    prefix = layer_norm(prefix, p, "norm", config.norm_eps)
    result = linear(prefix[:, 0], p, "head")
    return (result + linear(prefix[:, 1], p, "dist_head")) / 2 if config.distilled else result


def pyramid_logits(images, p, stats, config):
    """Evaluation logits [B, C] of a hierarchical MaiT."""
    x, (h, w) = embed(images, p)
    x = layer_norm(x, p, "patch_norm", config.norm_eps) + p["pos_embed"]
    layer = 0
    for stage, depth in enumerate(config.depths):
        if stage:
            image = x.reshape(len(x), h, w, -1)
            corners = [image[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            h, w = h // 2, w // 2
            x = np.concatenate(corners, -1).reshape(len(x), h * w, -1)
            x = linear(
                layer_norm(x, p, f"merges/{stage - 1}/norm", config.norm_eps),
                p,
                f"merges/{stage - 1}/reduction",
            )
        for _ in range(depth):
            x = block(x, p, config, layer, (h, w), 0)
            layer += 1
    x = layer_norm(x, p, "norm", config.norm_eps).mean(1)
    result = linear(x, p, "head")
    return (result + linear(x, p, "dist_head")) / 2 if config.distilled else result
