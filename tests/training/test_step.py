"""The step's identities: accumulated = whole, split over any mesh = one device, EMA, randomness."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spvit_jax.augment.mix import BatchTransform
from spvit_jax.models import model_config
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.models.naming import named_leaves
from spvit_jax.training import sharding, step
from spvit_jax.training import state as state_lib
from spvit_jax.training.losses import Targets, classification_loss, hard_labels, smooth_labels
from tests.helpers.variables import random_variables

SMALL = {"image_size": 12, "patch_size": 2, "dim": 16, "num_heads": 2}
TRANSFORM = BatchTransform(mean=(0.5,) * 3, std=(0.5,) * 3)
SETTINGS = step.StepSettings(num_classes=10, transform=TRANSFORM, label_smoothing=0.1, ema=0.9)
ROOT = jax.random.key(0)
# Linear in the gradient; Adam's first steps would make signs of the rounding of small gradients.
SGD = optax.sgd(0.05)


def make_batch(size=16):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, 12, 12, 3)).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, 10, size).astype(np.int32)}


FAMILIES = {
    "spvit_s": {"depth": 2, "stem_width": 8, "spatial_layers": 1, "drop_path": 0.3},
    "mait_t": {"depth": 2},
    "deit_ti": {"depth": 2, "drop_path": 0.0},
    "cait_xxs24": {"depth": 2, "layer_scale": 0.1, "drop_path": 0.3, "masked_heads": ((2, 1),)},
    "swin_t": {"depths": (2, 1), "window": 3, "drop_path": 0.3, "masked_heads": ((3, 1),)},
}


def make_state(name="spvit_s", **overrides):
    """A small model's state with random weights; with drop path unless told otherwise."""
    settings = SMALL | FAMILIES[name] | overrides
    variables = random_variables(name, num_classes=10, **settings)
    return state_lib.create(variables.model(), SGD, ema=True)


@functools.cache
def jitted(settings):
    return jax.jit(functools.partial(step.train_step, optimizer=SGD, settings=settings))


evaluate = jax.jit(functools.partial(step.eval_step, settings=SETTINGS))


@jax.jit
def evaluation_logits(variables, images):
    return variables.model().outputs(images).evaluation_logits()


def run(state, settings=SETTINGS, steps=2):
    for _ in range(steps):
        state = jitted(settings)(state, make_batch(), ROOT)
    return state


def assert_close(left, right, rtol=1e-3, atol=1e-5):
    left, right = named_leaves(left), named_leaves(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol, atol, err_msg=name)


@pytest.mark.parametrize(
    ("name", "data", "fsdp", "accumulate"),
    [
        *[("spvit_s", 8, 1, 1), ("spvit_s", 1, 8, 1), ("spvit_s", 2, 4, 2)],
        *[("cait_xxs24", 2, 4, 1), ("swin_t", 2, 4, 1), ("spvit_s, as loops", 2, 4, 1)],
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(name, data, fsdp, accumulate):
    """With drop path, MixUp, CutMix and BatchNorm, all of which look across the batch.

    Two groups of images on eight devices.
    """
    name, _, as_loops = name.partition(", ")
    deeper = {"depth": 4, "spatial_layers": 2} if as_loops else {}
    if accumulate > 1:  # once also with groups for BatchNorm that lie over several devices
        deeper["batch_norm_group"] = 4
    transform = dataclasses.replace(TRANSFORM, mixup=0.8, cutmix=1.0, mix_group_size=8)
    if fsdp == 8:  # once also with dimensions that it does not divide, and with what is slow
        deeper["dim"] = 12
        transform = dataclasses.replace(transform, erase=0.5)
    settings = dataclasses.replace(SETTINGS, transform=transform, accumulate=accumulate)
    mesh = sharding.make_mesh(data, fsdp)
    expected = run(make_state(name, **deeper), settings)
    state = make_state(name, **deeper, scan=bool(as_loops))

    shardings = sharding.state_shardings(state, mesh, "fsdp")
    take = jax.jit(
        sharding.on_mesh(mesh, step.train_step, optimizer=SGD, settings=settings),
        donate_argnames="state",
        out_shardings=shardings,
    )
    state = jax.device_put(state, shardings)
    for _ in range(2):
        state = take(state, sharding.put_batch(make_batch(), mesh), ROOT)
    kernel = named_leaves(state)["model/params/blocks/0/mlp/fc1/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
    assert_close(state, expected)


def test_accumulation_is_the_whole_batch():
    """Without BatchNorm, whose statistics are those of a micro-batch; with groups of MixUp."""
    state = make_state("mait_t", drop_path=0.0)
    transform = dataclasses.replace(TRANSFORM, mixup=0.8, cutmix=1.0, mix_group_size=8)
    settings = dataclasses.replace(SETTINGS, transform=transform)
    assert_close(run(state, settings), run(state, dataclasses.replace(settings, accumulate=4)))


def test_average_covers_parameters_and_batchnorm_statistics():
    before = make_state()
    after = run(before, steps=1)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before.ema, after.model)
    assert_close(after.ema, expected)
    old, new = (named_leaves(state.model.stats) for state in (before, after))
    assert len(new) == 6
    assert all(not np.array_equal(old[name], new[name]) for name in new)


def test_randomness_depends_on_the_step_alone():
    """A state read back from the host goes on as if it had never left the device."""
    first = run(make_state(), steps=1)
    again = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), first)
    for a, b in zip(
        jax.tree.leaves(run(first, steps=1)), jax.tree.leaves(run(again, steps=1)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    keys = {int(jax.random.bits(step.key_for(ROOT, name, n))) for name in "ab" for n in range(3)}
    assert len(keys) == 6


def test_metrics_add_up_over_steps_and_loss_falls():
    first = run(make_state(), steps=1)
    later = run(first, steps=12)
    total, count = later.metrics["loss"]
    assert count == 13 * 16
    assert total / count < first.metrics["loss"][0] / 16
    assert later.metrics["grad_norm"][1] == 13


def test_bfloat16_with_recomputation_trains_float32_parameters():
    first = run(make_state(dtype="bfloat16", remat=True), steps=1)
    later = run(first, steps=12)
    assert later.metrics["loss"][0] / 13 < first.metrics["loss"][0]
    leaves = named_leaves((later.model, later.ema))
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["mait_s_layerscale", "cait_xxs24"])
def test_bfloat16_trains_layer_scale_from_1e_5_as_float32_does(name):
    """What the blocks add to the tokens, before and after a step, and what the step changes."""

    def trained(dtype):
        small = SMALL | {"dim": 96, "num_heads": 4, "depth": 2, "drop_path": 0.0}
        config = model_config(name, dtype=dtype, num_classes=10, scan=True, **small)
        assert config.layer_scale == 1e-5
        adamw = optax.adamw(1e-3)
        state = state_lib.create(config.build(CountedRngs(0)), adamw, ema=False)
        settings = step.StepSettings(num_classes=10, transform=TRANSFORM)
        take = functools.partial(step.train_step, optimizer=adamw, settings=settings)
        after = jax.jit(take)(state, make_batch(), ROOT)

        @jax.jit
        def added(variables):
            model, images = variables.model(), TRANSFORM.normalize(make_batch()["image"])
            first, *_, last = model.hidden_states(model.embed(images))
            return last.x.astype(jnp.float32) - first.x.astype(jnp.float32)

        step_taken = jax.tree.map(jnp.subtract, after.model.params, state.model.params)
        return added(state.model), added(after.model), jax.flatten_util.ravel_pytree(step_taken)[0]

    for rounded, exact in zip(trained("bfloat16"), trained("float32"), strict=True):
        assert jnp.linalg.norm(rounded - exact) < 0.05 * jnp.linalg.norm(exact)


def test_first_step_that_is_not_a_number_is_remembered():
    state = run(make_state(), steps=1)
    state_lib.check_finite(state)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.model.params)
    state = run(state.replace(model=state.model.replace(params=broken)))
    with pytest.raises(FloatingPointError, match="step 2 "):
        state_lib.check_finite(state)


def test_eval_step_counts_by_the_mask():
    variables = make_state().model
    batch = make_batch() | {"mask": np.array([1] * 11 + [0] * 5, np.float32)}
    whole = evaluate(variables, batch)
    part = {key: value[:11] for key, value in batch.items()}
    for name, (total, count) in evaluate(variables, part).items():
        assert whole[name][1] == count == 11
        np.testing.assert_allclose(whole[name][0], total, rtol=1e-5)
    assert 0 <= whole["top1"][0] <= whole["top5"][0] <= 11


def test_any_of_several_labels_is_right_and_an_image_without_one_does_not_count():
    """ImageNet-ReaL's way; with one label each it is the usual one."""
    variables = make_state().model
    batch = make_batch() | {"mask": np.ones(16, np.float32)}
    single = evaluate(variables, batch)
    several = batch | {"label": np.eye(10, dtype=np.uint8)[batch["label"]]}
    for name, (total, count) in evaluate(variables, several).items():
        np.testing.assert_allclose(total, single[name][0], rtol=1e-5)
        assert count == 16

    images = SETTINGS.transform.normalize(jnp.asarray(batch["image"]))
    logits = np.asarray(evaluation_logits(variables, images))
    rng = np.random.default_rng(1)
    right = (rng.random((16, 10)) < 0.2).astype(np.uint8)
    right[:3] = 0
    counted = right.any(1)
    assert 3 <= (~counted).sum() < 10
    metrics = evaluate(variables, batch | {"label": right})
    best = np.argsort(-logits, axis=1)
    ranked = np.take_along_axis(right, best, axis=1) > 0
    log_p = np.asarray(jax.nn.log_softmax(logits))
    loss = -(log_p * right)[counted].sum(1) / right[counted].sum(1)
    expected = {"loss": loss.sum(), "top1": ranked[:, 0].sum(), "top5": ranked[:, :5].any(1).sum()}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-4)
        assert metrics[name][1] == counted.sum()


def test_loss_of_each_head():
    from spvit_jax.models import Outputs

    rng = np.random.default_rng(0)
    logits, distilled = rng.normal(size=(2, 4, 10)).astype(np.float32)
    dense = rng.normal(size=(4, 6, 10)).astype(np.float32)
    targets = smooth_labels(jnp.array([3, 1, 4, 1]), 10, 0.1)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    assert float(targets[0, 3]) == pytest.approx(0.91)

    def cross_entropy(logits, targets):
        logits = logits.astype(np.float64)
        return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1).mean()

    expected = (cross_entropy(logits, targets) + cross_entropy(distilled, targets)) / 2
    expected += 0.7 * cross_entropy(dense, targets[:, None])
    outputs = Outputs(logits, distilled, dense)
    loss = classification_loss(outputs, Targets(targets), dense_weight=0.7)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)

    teacher = hard_labels(jnp.asarray(rng.normal(size=(4, 10))))
    assert (teacher.sum(1) == 1).all()
    expected += (cross_entropy(distilled, teacher) - cross_entropy(distilled, targets)) / 2
    loss = classification_loss(outputs, Targets(targets, teacher), dense_weight=0.7)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_distillation_token_learns_what_the_teacher_says(accumulate):
    student = make_state("deit_ti", distilled=True)
    teacher = random_variables("deit_ti", **SMALL, depth=1, num_classes=10, seed=7)
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate)
    batch = make_batch()
    state = jitted(settings)(student, batch, ROOT, teacher)
    images = TRANSFORM.normalize(batch["image"])

    @jax.jit
    def expected(student, teacher):
        outputs = student.model(train=True).outputs(images)
        labels = smooth_labels(jnp.asarray(batch["label"]), 10, 0.1)
        return classification_loss(
            outputs, Targets(labels, hard_labels(teacher.model()(images))), 1
        )

    total, count = state.metrics["loss"]
    assert float(total / count) == pytest.approx(float(expected(student.model, teacher)), rel=1e-4)
    without = jitted(settings)(student, batch, ROOT)
    assert float(without.metrics["loss"][0]) != pytest.approx(float(total), rel=1e-2)


def test_mix_token_brings_each_tokens_logits_back(monkeypatch):
    """With a box around everything each image is its partner's, and its tokens come back whole."""
    everything = lambda key, shape, keep: jnp.ones(shape, bool)  # noqa: E731
    monkeypatch.setattr(step.mix, "random_box", everything)
    variables = make_state(drop_path=0.0).model
    images = TRANSFORM.normalize(make_batch()["image"])
    labels = jax.nn.one_hot(jnp.asarray(make_batch()["label"]), 10)
    settings = dataclasses.replace(SETTINGS, mix_token=4)

    @jax.jit
    def both(variables):
        plain = variables.model().outputs(images)
        key = jax.random.key(0)
        return plain, *step._outputs(variables.model(), images, Targets(labels), key, settings)

    plain, mixed, targets = both(variables)
    np.testing.assert_allclose(mixed.dense, plain.dense, rtol=1e-3, atol=1e-4)
    partner = np.arange(16).reshape(4, 4)[:, ::-1].ravel()
    np.testing.assert_allclose(mixed.logits, plain.logits[partner], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(targets.label, labels[partner])
    np.testing.assert_array_equal(targets.dense[:, 0], labels)


def test_mix_tokens_label_is_the_boxs_share():
    variables = make_state(drop_path=0.0).model
    images = TRANSFORM.normalize(make_batch()["image"])
    settings = dataclasses.replace(SETTINGS, mix_token=4)
    key = jax.random.key(5)
    _, targets = jax.jit(
        lambda v: step._outputs(v.model(), images, Targets(jnp.eye(16)), key, settings)
    )(variables)
    patches = jnp.zeros((16, 6, 6, 1))
    _, boxes = step.mix.mix_tokens(patches, jax.random.fold_in(key, 1), 4)
    share = np.asarray(boxes).mean((1, 2))
    assert share.max() > 0.05
    partner = np.arange(16).reshape(4, 4)[:, ::-1].ravel()
    np.testing.assert_allclose(targets.label[np.arange(16), partner], share, rtol=1e-6)
    np.testing.assert_allclose(targets.label.sum(1), 1, rtol=1e-6)


def test_label_maps_become_the_targets():
    """One step with maps that say the label everywhere is one step without maps."""
    batch = make_batch()
    maps = np.zeros((16, 2, 5, 9, 9), np.float16)
    maps[:, 1] = ((batch["label"][:, None] + np.arange(5)) % 10)[:, :, None, None]
    maps[:, 0, 0] = 30
    box = np.tile(np.float32([0.1, 0.2, 0.9, 0.8]), (16, 1))
    with_maps = batch | {"label_map": maps, "box": box, "flip": np.arange(16) % 2 == 0}
    state, settings = make_state(), dataclasses.replace(SETTINGS, grid=(6, 6))
    losses = [
        float(jitted(settings)(state, batch, ROOT).metrics["loss"][0])
        for batch in (batch, with_maps)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    maps[:, 1] = (maps[:, 1] + 1) % 10
    outside = np.float32(np.eye(3)) + np.float32([[0, 0, 2], [0, 0, 0], [0, 0, 0]])
    moved_away = with_maps | {"move": np.tile(outside, (16, 1, 1))}
    changed = [jitted(settings)(state, batch, ROOT) for batch in (with_maps, moved_away)]
    changed = [float(state.metrics["loss"][0]) for state in changed]
    assert min(abs(loss / losses[0] - 1) for loss in changed) > 1e-2
    assert changed[0] != pytest.approx(changed[1], rel=1e-2)


def test_a_teacher_sees_what_its_student_sees():
    """The augmented images, for which it says something else than for those of the host."""
    transform = dataclasses.replace(TRANSFORM, mixup=0.8, erase=1.0)
    settings = dataclasses.replace(SETTINGS, transform=transform)
    student = make_state("deit_ti", distilled=True)
    teacher = random_variables("deit_ti", **SMALL, depth=1, num_classes=10, seed=7)
    batch = make_batch()
    state = jitted(settings)(student, batch, ROOT, teacher)

    @jax.jit
    def expected(student, teacher):
        labels = smooth_labels(jnp.asarray(batch["label"]), 10, 0.1)
        key = step.key_for(ROOT, "mix", student.step)
        images, labels = transform(jnp.asarray(batch["image"]), labels, key)
        said = hard_labels(teacher.model()(images))
        of_the_host = hard_labels(teacher.model()(transform.normalize(batch["image"])))
        outputs = student.model.model(train=True).outputs(images)
        return classification_loss(outputs, Targets(labels, said), 1), (said != of_the_host).any(1)

    loss, differs = expected(student, teacher)
    assert differs.any()
    total, count = state.metrics["loss"]
    assert float(total / count) == pytest.approx(float(loss), rel=1e-4)


def test_top5_counts_the_labels_up_to_the_fifth():
    """Of 16 labels, each at a known place among the logits: 0 to 9, then 0 to 5."""
    variables = make_state().model
    batch = make_batch() | {"mask": np.ones(16, np.float32)}
    images = SETTINGS.transform.normalize(jnp.asarray(batch["image"]))
    logits = evaluation_logits(variables, images)
    places = np.arange(16) % 10
    batch["label"] = np.argsort(-logits, axis=1)[np.arange(16), places].astype(np.int32)
    metrics = evaluate(variables, batch)
    assert (metrics["top1"][0], metrics["top5"][0]) == (2, 10)


def test_the_average_is_evaluated():
    """After a step with a decay of 0.9 it has gone a tenth of the way."""
    before = make_state()
    after = run(before, steps=1)
    name = "params/head/kernel"
    old, new, best = (named_leaves(v)[name] for v in (before.model, after.model, after.best_model))
    assert abs(new - old).max() > 1e-3
    np.testing.assert_allclose(best - old, 0.1 * (new - old), rtol=1e-3, atol=1e-6)
    alone = state_lib.create(after.model.model(), SGD, ema=False)
    np.testing.assert_array_equal(named_leaves(alone.best_model)[name], new)


def test_micro_batches_of_the_same_images_lose_different_branches():
    def loss_of(parts, **changes):
        state = make_state("mait_t", **changes)
        settings = dataclasses.replace(SETTINGS, accumulate=parts)
        # Micro-batches take the examples in turn.
        batch = {name: np.repeat(array, parts, 0) for name, array in make_batch(8).items()}
        total, count = jitted(settings)(state, batch, ROOT).metrics["loss"]
        assert count == 8 * parts
        return float(total / count)

    assert loss_of(1, drop_path=0.0) == pytest.approx(loss_of(2, drop_path=0.0), rel=1e-5)
    assert loss_of(1, drop_path=0.5) != pytest.approx(loss_of(2, drop_path=0.5), rel=1e-3)


def test_the_reported_gradient_is_what_sgd_takes():
    before = make_state()
    after = run(before, steps=1)
    moved = jax.tree.map(lambda old, new: (old - new) / 0.05, before.model, after.model).params
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(moved)))
    assert float(after.metrics["grad_norm"][0]) == pytest.approx(float(norm), rel=1e-3)


def _nan_in_the_gradient_alone(outputs, targets, dense_weight):
    """A loss of a finite number whose derivative is not one: √x at 0."""
    loss = classification_loss(outputs, targets, dense_weight)
    return loss + jnp.sqrt(0 * loss)


def test_a_gradient_that_is_not_a_number_is_remembered_though_the_loss_is_one():
    settings = dataclasses.replace(SETTINGS, loss=_nan_in_the_gradient_alone)
    state = jitted(settings)(run(make_state(), steps=1), make_batch(), ROOT)
    assert np.isfinite(state.metrics["loss"][0])
    with pytest.raises(FloatingPointError, match="the loss at step 2 or its gradient"):
        state_lib.check_finite(state)


def test_a_gradient_whose_square_overflows_is_remembered():
    """Adam's second moment would be infinite, and the parameters would stand still for ever."""

    def steep(outputs, targets, dense_weight):
        loss = classification_loss(outputs, targets, dense_weight)
        return loss + 1e25 * (loss - jax.lax.stop_gradient(loss))

    adam, settings = optax.adam(1e-3), dataclasses.replace(SETTINGS, loss=steep)
    variables = make_state("mait_t").model
    state = state_lib.create(variables.model(), adam, ema=True)
    state = jax.jit(functools.partial(step.train_step, optimizer=adam, settings=settings))(
        state, make_batch(), ROOT
    )
    assert np.isfinite(state.metrics["loss"][0])
    moments = named_leaves(state.opt_state)
    assert not all(np.isfinite(leaf).all() for leaf in moments.values())
    with pytest.raises(FloatingPointError, match="the loss at step 1 or its gradient"):
        state_lib.check_finite(state)


def test_statistics_of_batchnorm_that_are_not_finite_are_remembered():
    state = make_state()
    stats = jax.tree.map(lambda leaf: leaf + jnp.inf, state.model.stats)
    state = run(state.replace(model=state.model.replace(stats=stats)), steps=1)
    assert np.isfinite(state.metrics["loss"][0])
    assert np.isfinite(state.metrics["grad_norm"][0])
    with pytest.raises(FloatingPointError, match="step 1"):
        state_lib.check_finite(state)


def test_a_state_is_looked_at_before_it_is_saved():
    """One number of one leaf, in each thing that is saved, over several devices."""
    variables = random_variables("spvit_s", num_classes=10, **(SMALL | FAMILIES["spvit_s"]))
    state = state_lib.create(variables.model(), optax.adam(1e-3), ema=True)
    shardings = sharding.state_shardings(state, sharding.make_mesh(2, 4), "fsdp")
    finite = jax.jit(state_lib.finite_leaves)
    state = jax.device_put(state, shardings)
    state_lib.check_finite(state, finite(state))

    for name, value in (
        ("model/params/blocks/1/mlp/fc1/kernel", np.nan),
        ("ema/params/head/bias", np.inf),
        ("opt_state/0/nu/blocks/0/norm1/scale", np.inf),
        ("opt_state/0/mu/blocks/0/norm1/scale", -np.inf),
        ("model/stats/patch_embed/bn2/var", np.inf),
    ):
        leaves = named_leaves(state)
        leaves[name] = leaves[name].at[-1].set(value)
        broken = jax.tree.unflatten(jax.tree.structure(state), leaves.values())
        broken = jax.device_put(broken, shardings)
        state_lib.check_finite(broken)  # no step has told
        with pytest.raises(FloatingPointError, match=f"after step 0 .*not finite, in {name};"):
            state_lib.check_finite(broken, finite(broken))
