"""Which parameters decay, AdamW against NumPy, and the schedule at its corners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from spvit_jax import config as config_lib
from spvit_jax.errors import InputError
from spvit_jax.models.naming import named_leaves
from spvit_jax.training import optimizer
from tests.helpers.timm_reference import timm
from tests.helpers.variables import random_variables


def resolved(**changes):
    config = config_lib.base()
    config.schedule.update({"total": "100 steps", "warmup": "10 steps", "cooldown": "20 steps"})
    config.optim.update({"lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6} | changes)
    return config_lib.resolve(config, num_examples=1000)


def test_what_decays():
    """Matrices do, w1 and w2 among them; vectors, biases, positions and tokens do not."""
    settings = {"image_size": 32, "depth": 2, "spatial_layers": 1, "dim": 12, "num_heads": 3}
    variables = random_variables("spvit_s", **settings, layer_scale=0.1, distilled=True)
    mask = named_leaves(optimizer.decay_mask(variables.params))
    shapes = {k: v.ndim for k, v in named_leaves(variables.params).items()}
    expected = {
        name: shapes[name] > 1 and not name.endswith(("b1", "pos_embed", "cls_token", "dist_token"))
        for name in shapes
    }
    assert mask == expected
    assert mask["blocks/0/attn/prior/w1"]
    assert mask["blocks/0/attn/prior/w2"]


def test_a_parameter_that_no_rule_knows_is_an_error():
    with pytest.raises(ValueError, match="no decay rule matches parameter 'strange'"):
        optimizer.decay_mask({"strange": jnp.ones(3)})


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("cooldown", [0, 20])
def test_schedule_is_timms(warmup, cooldown):
    config = config_lib.base()
    steps = {"total": 100, "warmup": warmup, "cooldown": cooldown}
    config.schedule.update({name: f"{number} steps" for name, number in steps.items()})
    rate = optimizer.make_schedule(config_lib.resolve(config, num_examples=1000))
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim.lr)
    # As its factory makes it of `--epochs`, `--warmup-epochs` and `--cooldown-epochs`.
    scheduler, total = timm.scheduler.create_scheduler_v2(
        theirs,
        "cosine",
        num_epochs=100 - cooldown,
        warmup_epochs=warmup,
        cooldown_epochs=cooldown,
        min_lr=config.optim.min_lr,
        warmup_lr=config.optim.warmup_lr,
    )
    assert total == 100
    for step in range(total):
        scheduler.step(step)
        (group,) = theirs.param_groups
        assert float(rate(step)) == pytest.approx(group["lr"], rel=2e-4), step


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_torchs(clip):
    """Decay times the learning rate, bias-corrected moments, clipping over all parameters."""
    config = resolved(weight_decay=0.1, clip_norm=clip)
    tx = optimizer.make_optimizer(config)
    rate = optimizer.make_schedule(config)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    opt_state = tx.init(ours)
    moments = dict.fromkeys(params, (0.0, 0.0))
    for step in range(4):
        grads = {k: rng.normal(size=v.shape) for k, v in params.items()}
        updates, opt_state = tx.update(
            {k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}, opt_state, ours
        )
        ours = {k: ours[k] + updates[k] for k in ours}
        if clip:
            norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
            grads = {k: g * min(1, clip / norm) for k, g in grads.items()}
        for k, g in grads.items():
            m, v = moments[k]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[k] = m, v
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            decay = 0.1 * params[k] if k == "kernel" else 0
            params[k] = params[k] - float(rate(step)) * (m / (np.sqrt(v) + 1e-8) + decay)
    for k in params:
        np.testing.assert_allclose(ours[k], params[k], rtol=1e-5, atol=1e-7)


def take_steps(tx, params, gradients):
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def random_arrays(seed):
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(size=(3, 2)).astype(np.float32),
        "bias": rng.normal(size=2).astype(np.float32),
    }


def test_sgd_is_torchs():
    config = resolved(name="sgd", weight_decay=0.1)
    gradients = [random_arrays(seed) for seed in range(1, 5)]
    ours = take_steps(optimizer.make_optimizer(config), random_arrays(0), gradients)
    rate = optimizer.make_schedule(config)
    theirs = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in random_arrays(0).items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for step, grads in enumerate(gradients):
        for group in sgd.param_groups:
            group["lr"] = float(rate(step))
        for name, grad in grads.items():
            theirs[name].grad = torch.from_numpy(grad)
        sgd.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), rtol=1e-5)


def test_lamb_moves_a_matrix_by_its_share():
    """By the learning rate times its own norm, whatever the gradient's size."""
    config = resolved(name="lamb", weight_decay=0.0, lr=1e-2, warmup_lr=1e-2)
    params = random_arrays(0)
    for size in (1e-3, 1.0, 1e3):
        grads = {name: size * value for name, value in random_arrays(1).items()}
        moved = take_steps(optimizer.make_optimizer(config), params, [grads])
        step = np.linalg.norm(moved["kernel"] - params["kernel"])
        assert step == pytest.approx(1e-2 * np.linalg.norm(params["kernel"]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "spvit_s",
            {"depth": 3, "spatial_layers": 2},
            {"patch_embed/conv1/kernel": 4, "pos_embed": 4, "cls_token": 4}
            | {"blocks/0/attn/prior/w1": 3, "blocks/2/mlp/fc1/bias": 1}
            | {"norm/scale": 0, "head/kernel": 0, "dense_head/bias": 0},
        ),
        (
            "cait_xxs24",
            {"depth": 3},
            {"pos_embed": 6, "blocks/2/attn/qkv/kernel": 3, "class_blocks/0/attn/q/kernel": 2}
            | {"class_blocks/1/mlp/fc2/bias": 1, "head/kernel": 0},
        ),
        (
            "swin_t",
            {"depths": (2, 1, 1)},
            {"patch_norm/scale": 5, "blocks/1/norm1/scale": 3, "merges/0/reduction/kernel": 2}
            | {"blocks/2/norm1/scale": 2, "merges/1/norm/bias": 1, "norm/bias": 0},
        ),
    ],
)
def test_layers_have_rates_that_decay_downwards(name, settings, expected):
    small = {"image_size": 64, "dim": 12, "num_heads": 3}
    params = random_variables(name, **small, **settings).params
    scales = named_leaves(optimizer.layer_scales(params, 0.5))
    assert scales.keys() == named_leaves(params).keys()
    assert {leaf: scales[leaf] for leaf in expected} == {k: 0.5**v for k, v in expected.items()}

    config = resolved(layer_decay=0.5, weight_decay=0.1, lr=1e-2, warmup_lr=1e-2)
    grads = jax.tree.map(jnp.ones_like, params)
    plain = optimizer.make_optimizer(resolved(weight_decay=0.1, lr=1e-2, warmup_lr=1e-2))
    updates = [
        named_leaves(jax.jit(lambda tx=tx: tx.update(grads, tx.init(params), params)[0])())
        for tx in (optimizer.make_optimizer(config), plain)
    ]
    for leaf, layers in expected.items():
        np.testing.assert_allclose(updates[0][leaf], 0.5**layers * updates[1][leaf], rtol=1e-6)


def test_an_optimizer_that_there_is_not():
    with pytest.raises(InputError, match=r"unknown optim\.name 'adam'; did you mean 'adamw'"):
        optimizer.make_optimizer(resolved(name="adam"))
