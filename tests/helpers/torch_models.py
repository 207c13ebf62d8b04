"""The columnar family in PyTorch, to compare with: the authors' names, pairs in place of tables.

Nothing here is shared with the package. `build` gives the module of a configuration; the families
that timm has come from timm itself.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.timm_reference import timm


class SpatialAttention(nn.Module):
    """SP-SA: every pair of patches goes through the network of the offset."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(dim, 2 * dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(2, dim)
        self.w2 = nn.Parameter(torch.zeros(dim, 1))
        self.b2 = nn.Parameter(torch.ones(heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid, num_prefix, masked, radius, hard):
        batch, n, dim = x.shape
        d = dim // self.heads
        split = (batch, n, self.heads, d)
        query, key = (part.reshape(split) for part in self.qk(x).chunk(2, -1))
        scores = torch.einsum("bihd,bjhd->bhij", query, key) / d**0.5
        y, x_ = (
            axis.flatten().to(x)
            for axis in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        )
        # From query i to key j: first right, then down. One query after the other, for all pairs'
        # hidden units together are half a gigabyte.
        gain = torch.stack(
            [
                (F.relu(self.w1(offset)) * self.w2[:, 0]).unflatten(1, (self.heads, d)).sum(-1)
                for offset in torch.stack([x_[None, :] - x_[:, None], y[None, :] - y[:, None]], -1)
            ]
        )
        gain = gain + self.b2
        scores = mask_heads(scores * gain.permute(2, 0, 1), grid, num_prefix, masked, radius, hard)
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), self.v(x).reshape(split))
        return self.proj(out.reshape(batch, n, dim))


class PlainAttention(nn.Module):
    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid, num_prefix, masked, radius, hard):
        batch, n, dim = x.shape
        split = (batch, n, self.heads, dim // self.heads)
        query, key, value = (
            part.reshape(split).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        scores = query @ key.transpose(-2, -1) / (dim // self.heads) ** 0.5
        weights = mask_heads(scores, grid, num_prefix, masked, radius, hard).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, n, dim))


def mask_heads(scores, grid, num_prefix, masked, radius, hard):
    """MaiT's mask on some heads: a patch's scores outside its neighbourhood are 0 or gone."""
    y = torch.arange(grid[0] * grid[1]) // grid[1]
    x = torch.arange(grid[0] * grid[1]) % grid[1]
    far = ((y[:, None] - y).abs() > radius[0]) | ((x[:, None] - x).abs() > radius[1])
    far = F.pad(far, (num_prefix, 0, num_prefix, 0))
    far = torch.stack([far if head in masked else far & False for head in range(scores.shape[1])])
    return scores.masked_fill(far, -torch.inf if hard else 0.0)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.masked = config, config.masked_per_layer()[layer]
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        spatial = layer < config.spatial_layers
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = (
            SpatialAttention(dim, config.num_heads)
            if spatial
            else PlainAttention(dim, config.num_heads, config.qkv_bias)
        )
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        if config.layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.ones(dim))
            self.gamma_2 = nn.Parameter(torch.ones(dim))
        if config.pos_conv:
            convolution = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.pos_block = nn.ModuleDict({"proj": nn.Sequential(convolution)})

    def forward(self, x, grid, num_prefix):
        config = self.config
        hard = config.mask_kind == "hard"
        mask = (self.masked, config.mask_shape, hard)
        branch = self.attn(self.norm1(x), grid, num_prefix, *mask)
        x = x + branch * getattr(self, "gamma_1", 1) / config.skip_lam
        branch = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        x = x + branch * getattr(self, "gamma_2", 1) / config.skip_lam
        if config.pos_conv:
            prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
            image = patches.transpose(1, 2).unflatten(2, grid)
            patches = patches + self.pos_block["proj"](image).flatten(2).transpose(1, 2)
            x = torch.cat([prefix, patches], 1)
        return x


class Stem(nn.Module):
    def __init__(self, dim, patch, width):
        super().__init__()
        for index, (channels, kernel, stride) in enumerate(
            [(3, 7, 2), (width, 3, 1), (width, 3, 1)], 1
        ):
            pad = kernel // 2
            setattr(
                self, f"conv{index}", nn.Conv2d(channels, width, kernel, stride, pad, bias=False)
            )
            setattr(self, f"bn{index}", nn.BatchNorm2d(width))
        self.proj = nn.Conv2d(width, dim, patch // 2, patch // 2)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.proj(F.relu(self.bn3(self.conv3(x))))


class TorchViT(nn.Module):
    """Evaluation logits [B, C] of images [B, 3, H, W], for any `ViTConfig` with raw offsets."""

    def __init__(self, config):
        super().__init__()
        assert config.prior_extent is None
        dim, classes = config.dim, config.num_classes
        self.config = config
        self.patch_embed = (
            Stem(dim, config.patch_size, config.stem_width)
            if config.stem_width
            else nn.ModuleDict({"proj": nn.Conv2d(3, dim, config.patch_size, config.patch_size)})
        )
        self.class_token_block = config.spatial_layers or config.class_token_layer or 0
        prefix = 2 if config.distilled else 1
        rows = config.grid[0] * config.grid[1] + (0 if self.class_token_block else prefix)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = nn.Linear(dim, classes)
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.head_dist = nn.Linear(dim, classes)
        if config.dense_head:
            self.aux_head = nn.Linear(dim, classes)

    def forward(self, images):
        config = self.config
        embed = self.patch_embed if config.stem_width else self.patch_embed["proj"]
        image = embed(images)
        grid = tuple(image.shape[2:])
        x = image.flatten(2).transpose(1, 2)
        tokens = [self.cls_token] + ([self.dist_token] if config.distilled else [])
        prefix = torch.cat(tokens, 1).expand(len(images), -1, -1)
        x = (
            x + self.pos_embed
            if self.class_token_block
            else torch.cat([prefix, x], 1) + self.pos_embed
        )
        for layer, block in enumerate(self.blocks):
            if self.class_token_block and layer == self.class_token_block:
                x = torch.cat([prefix, x], 1)
            x = block(x, grid, len(tokens) if layer >= self.class_token_block else 0)
        x = self.norm(x)
        logits = self.head(x[:, 0])
        if config.distilled:
            logits = (logits + self.head_dist(x[:, 1])) / 2
        if config.dense_head:
            logits = logits + 0.5 * self.aux_head(x[:, len(tokens) :]).amax(1)
        return logits


def build_timm(name, **settings):
    """A model of timm, in evaluation mode."""
    return timm.create_model(name, **settings).eval()


def randomise(module, seed=0):
    """Draws weights away from their initial values, of a size that keeps activations in range."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=rng).to(value)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.abs() / 4)
            elif name.endswith("b2") or (
                ("norm" in name or ".bn" in name) and name.endswith("weight")
            ):
                value.copy_(1 + noise / 5)
            elif name.endswith(("gamma_1", "gamma_2", "gamma")):
                value.copy_(0.3 + noise / 10)
            elif name.endswith("w1.weight"):
                value.copy_(noise / 5)
            elif name.endswith((".w2", "pos_block.proj.0.weight")):
                value.copy_(noise / 10)
            elif value.ndim > 1 and "embed" not in name.rsplit(".", 1)[-1] and "table" not in name:
                value.copy_(noise / (value[0].numel()) ** 0.5)
            else:
                value.copy_(noise / 5)
    return module
