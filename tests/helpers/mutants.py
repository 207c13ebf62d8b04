"""Deliberate mistakes in the package, each with the test that must fail for it.

`python -m benchmarks.mutants` makes them in a copy of the tree; `test_mutants.py` sees to it that
each can still be made.
"""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The package with one mistake in it.

    Attributes:
      mistake: what is wrong, in a few words.
      file: that has it, under `spvit_jax`.
      old: text that the file holds exactly once.
      new: what replaces it.
      test: that must fail then, as pytest takes it, under `tests`.
    """

    mistake: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.file}: {self.mistake}"

    def source(self, root: pathlib.Path) -> str:
        """Returns the file's text with the mistake, from a tree at `root` that has none.

        Raises:
          ValueError: the old text is not there exactly once.
        """
        text = (root / "spvit_jax" / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self}: expected {self.old!r} once in the file, found it {count} times"
            )
        return text.replace(self.old, self.new)


MUTANTS: tuple[Mutant, ...] = (
    # The models.
    Mutant(
        "BatchNorm's momentum is 0.99",
        "models/stem.py",
        "momentum=0.9,",
        "momentum=0.99,",
        "models/test_layers.py::test_batch_norm_is_torchs",
    ),
    Mutant(
        "both branches are lost together",
        "models/layers.py",
        "(len(rates), 2, examples))",
        "(len(rates), 1, examples)).repeat(2, axis=1)",
        "models/test_block.py::test_each_branch_of_each_layer_is_dropped_by_itself_at_timms_rate",
    ),
    Mutant(
        "all layers lose a branch together",
        "models/layers.py",
        "jax.random.bernoulli(key, keep_rate, (len(rates),",
        "jax.random.bernoulli(key, keep_rate, (1,",
        "models/test_block.py::test_each_branch_of_each_layer_is_dropped_by_itself_at_timms_rate",
    ),
    Mutant(
        "drop path is constant over ViT's depth",
        "models/base.py",
        "self.drop_path * layer / max(depth - 1, 1)",
        "self.drop_path",
        "models/test_block.py::test_each_branch_of_each_layer_is_dropped_by_itself_at_timms_rate",
    ),
    Mutant(
        "drop path grows with CaiT's depth",
        "models/cait.py",
        "[self.drop_path] * self.depth",
        "super().drop_path_per_layer()",
        "models/test_block.py::test_each_branch_of_each_layer_is_dropped_by_itself_at_timms_rate",
    ),
    Mutant(
        "linear layers start ten times as large",
        "models/initializers.py",
        "linear_kernel = nnx.initializers.normal(0.02)",
        "linear_kernel = nnx.initializers.normal(0.2)",
        "models/test_initializers.py::test_fresh_weights_are_distributed_as_timms",
    ),
    Mutant(
        "convolutions start with three times the variance",
        "models/initializers.py",
        "variance_scaling(1 / 3,",
        "variance_scaling(1,",
        "models/test_initializers.py::test_fresh_convolutions_are_distributed_as_torchs",
    ),
    Mutant(
        "one residual branch of LV-ViT is not divided by skip_lam",
        "models/block.py",
        "self.scale2, second)",
        "self.scale2, second) * self.skip_lam",
        "models/test_vit.py::test_logits_equal_the_reference",
    ),
    Mutant(
        "a bias' gradient is rounded to the dtype of the computation",
        "models/layers.py",
        "preferred_element_type=accumulation_dtype(gradient.dtype)",
        "preferred_element_type=gradient.dtype",
        "models/test_layers.py::test_a_biass_gradient_is_summed_in_float32",
    ),
    Mutant(
        "the second pixel of a pair sees what the first does",
        "models/stem.py",
        "(1 + shift, 2 - shift), (0, 0), (0, 0))) for shift in (0, 1)",
        "(1 + shift, 2 - shift), (0, 0), (0, 0))) for shift in (0, 0)",
        "models/test_layers.py::test_pairs_of_pixels_change_nothing",
    ),
    Mutant(
        "queries see offsets mirrored from left to right",
        "models/spatial.py",
        "for x in range(w)], axis=2)",
        "for x in reversed(range(w))], axis=2)",
        "models/test_spatial.py::test_toeplitz_places_each_offset_exactly",
    ),
    Mutant(
        "the gradient of a position convolution is not turned",
        "models/layers.py",
        "depthwise_conv(gradient, kernel[::-1, ::-1])",
        "depthwise_conv(gradient, kernel[::-1])",
        "kernels/test_position_conv.py::test_values_and_gradients_are_torchs",
    ),
    Mutant(
        "the position convolution of a row wraps around to the other side",
        "kernels/position_conv.py",
        "jnp.where(column > 0, pltpu.roll(row, 1, 0), 0)",
        "pltpu.roll(row, 1, 0)",
        "kernels/test_position_conv.py::test_values_and_gradients_are_torchs",
    ),
    Mutant(
        "each group of images of a position convolution begins the gradient anew",
        "kernels/position_conv.py",
        "pl.program_id(1) == 0",
        "pl.program_id(1) >= 0",
        "kernels/test_position_conv.py::test_values_and_gradients_are_torchs",
    ),
    Mutant(
        "GELU by tanh",
        "models/layers.py",
        "(0.5 * precise * (1 + jax.lax.erf(precise * 0.5**0.5))).astype(x.dtype)",
        "jax.nn.gelu(x, approximate=True)",
        "models/test_vit.py::test_logits_equal_the_reference",
    ),
    Mutant(
        "a mask's radius in rows is also that in columns",
        "models/spatial.py",
        "<= self.radius[1]",
        "<= self.radius[0]",
        "models/test_spatial.py::test_neighbourhood_equals_its_definition",
    ),
    Mutant(
        "the gradient of G is the last image's",
        "kernels/fused.py",
        "dgain_ref[head, rows, :] += ",
        "dgain_ref[head, rows, :] = ",
        "kernels/test_fused.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "the gradient of G is the last program's",
        "kernels/fused.py",
        "(pl.program_id(1) == 0) & (part == 0)",
        "part == 0",
        "kernels/test_fused.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "gradients of queries lack the scale",
        "kernels/fused.py",
        "_dot(dproducts, k, (1, 0)) * scale",
        "_dot(dproducts, k, (1, 0))",
        "kernels/test_fused.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "on GPUs the gradient of G is that of the first images",
        "kernels/fused_gpu.py",
        "part * images + index",
        "index",
        "kernels/test_fused_gpu.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "on GPUs a tile's padding is keys",
        "kernels/fused_gpu.py",
        "jnp.where(_exist(shape, keys)[None, :], scores, -jnp.inf)",
        "scores",
        "kernels/test_fused_gpu.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "on GPUs the gradients of queries and keys lack the gain",
        "kernels/fused_gpu.py",
        "dproducts = dscores if gain is None else dscores * gain",
        "dproducts = dscores",
        "kernels/test_fused_gpu.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "a tile of keys without a pair leaves NaN",
        "kernels/fused_gpu.py",
        "_LEAST = float(jnp.finfo(jnp.float32).min)",
        "_LEAST = -float(jnp.inf)",
        "kernels/test_fused_gpu.py::test_gain_and_bias_have_gradients_of_any_value",
    ),
    Mutant(
        "the kernel for GPUs is chosen on all of them",
        "models/implementation.py",
        "has_devices and supported",
        "supported",
        "kernels/test_fused_gpu.py::test_auto_is_xla_on_cards_that_do_not_run_the_kernel",
    ),
    Mutant(
        "prefix tokens are none of the tokens far away",
        "kernels/local.py",
        "tokens = shape.num_prefix + shape.grid[0]",
        "tokens = shape.grid[0]",
        "kernels/test_local.py::test_local_attention_equals_the_matrices",
    ),
    Mutant(
        "the sum of all values lacks the prefix tokens",
        "kernels/local.py",
        "everywhere = v.astype(far.dtype) @ jnp.ones(v.shape[-1], far.dtype)",
        "everywhere = v[..., shape.num_prefix :].sum(-1)",
        "kernels/test_local.py::test_local_attention_equals_the_matrices",
    ),
    Mutant(
        "the weight far away is not reduced by the largest score",
        "kernels/local.py",
        "far = jnp.exp(-largest)",
        "far = jnp.ones_like(largest)",
        "kernels/test_local.py::test_local_attention_equals_the_matrices",
    ),
    Mutant(
        "values have the gradient of the pair the other way",
        "kernels/local.py",
        "neighbour_sum(_reflect(near - far, shape.radius), grad, shape.radius)",
        "neighbour_sum(near - far, grad, shape.radius)",
        "kernels/test_local.py::test_local_attention_equals_the_matrices",
    ),
    Mutant(
        "a program takes the rows of others for a row outside of the grid",
        "kernels/local_plan.py",
        "jnp.where(exists, ref[...].astype(jnp.float32), 0.0)",
        "ref[...].astype(jnp.float32)",
        "kernels/test_fused_local.py::test_the_kernel_equals_the_slices",
    ),
    Mutant(
        "a neighbour's gradient is that of the pair the other way",
        "kernels/fused_local.py",
        "slice(-1 - index, dscores.shape[0] - index)",
        "slice(index, index + 1)",
        "kernels/test_fused_local.py::test_the_kernel_equals_the_slices",
    ),
    Mutant(
        "a kernel's values lack the gradient of the patches far away",
        "kernels/fused_local.py",
        "dk, dv = jnp.zeros_like(from_far), from_far",
        "dk, dv = jnp.zeros_like(from_far), jnp.zeros_like(from_far)",
        "kernels/test_fused_local.py::test_the_kernel_equals_the_slices",
    ),
    Mutant(
        "rows and columns of a local neighbourhood are exchanged",
        "models/spatial.py",
        "return min(self.radius[0], grid[0] - 1), min(self.radius[1], grid[1] - 1)",
        "return min(self.radius[1], grid[0] - 1), min(self.radius[0], grid[1] - 1)",
        "models/test_vit.py::test_logits_equal_the_reference",
    ),
    Mutant(
        "the process's devices decide on the implementation, not the program's",
        "models/implementation.py",
        "jax.default_backend() if device is None else device.platform",
        "jax.default_backend()",
        "models/test_implementation.py::test_the_devices_of_the_program_decide_not_those_of_the_process",
    ),
    Mutant(
        "weights are for the devices that they were trained on",
        "weights.py",
        'dataclasses.replace(config, attention="auto")',
        "config",
        "models/test_implementation.py::test_weights_do_not_say_how_attention_is_computed",
    ),
    Mutant(
        "the gradient of the keys' bias is the last image's",
        "kernels/fused.py",
        "dshift_ref[0, rows, columns] += ",
        "dshift_ref[0, rows, columns] = ",
        "kernels/test_fused.py::test_the_kernel_is_the_attention_of_xla",
    ),
    Mutant(
        "the class token enters a layer early",
        "models/vit.py",
        "return {layer: self._prepend_prefix}",
        "return {layer - 1: self._prepend_prefix}",
        "models/test_vit.py::test_logits_equal_the_reference",
    ),
    Mutant(
        "LayerNorm's epsilon is 1e-5 unless said",
        "models/base.py",
        "norm_eps: float = 1e-6",
        "norm_eps: float = 1e-5",
        "interop/test_parity.py::test_small_models_in_float64",
    ),
    Mutant(
        "SP-ViT-L has the skip_lam of SP-ViT-S",
        "models/__init__.py",
        "skip_lam=3.0, spatial_layers=22",
        "skip_lam=2.0, spatial_layers=22",
        "models/test_registry.py::test_branches_of_lvvit_and_spvit_are_scaled_and_dropped_as_their_authors_do",
    ),
    Mutant(
        "CaiT-S36 has the LayerScale of CaiT-S24",
        "models/__init__.py",
        "_cait(384, 8, 36, 0.2, layer_scale=1e-6)",
        "_cait(384, 8, 36, 0.2)",
        "models/test_registry.py::test_layer_scale_of_each_cait_is_timms",
    ),
    Mutant(
        "the class token has a learned bias",
        "models/attention.py",
        "pad_prefix(position(), num_prefix, 0.0)",
        "pad_prefix(position(), num_prefix, 1.0)",
        "models/test_vit.py::test_logits_equal_the_reference[deit_position_bias]",
    ),
    Mutant(
        "a layer more than asked for has a learned bias",
        "models/vit.py",
        "layer < config.position_bias_layers",
        "layer <= config.position_bias_layers",
        "models/test_vit.py::test_logits_equal_the_reference[deit_position_bias]",
    ),
    # Weights of others.
    Mutant(
        "matrices are not transposed",
        "interop/layouts.py",
        "MATRIX = Layout(lambda arrays, shape: arrays[0].T, lambda array: (array.T,))",
        "MATRIX = Layout(\n"
        "    lambda arrays, shape: arrays[0].reshape(shape),\n"
        "    lambda array: (array.reshape(array.shape[::-1]),),\n"
        ")",
        "interop/test_parity.py::test_small_models_in_float64",
    ),
    Mutant(
        "queries, keys and values of each head lie together",
        "models/attention.py",
        "3, num_heads, -1)",
        "num_heads, 3, -1).swapaxes(-3, -2)",
        "interop/test_parity.py::test_small_models_in_float64",
    ),
    Mutant(
        "Swin's offsets run from key to query",
        "interop/layouts.py",
        "arrays[0].T.reshape(shape)[:, ::-1, ::-1]",
        "arrays[0].T.reshape(shape)",
        "interop/test_parity.py::test_small_models_in_float64[swin]",
    ),
    Mutant(
        "positions are resized by jax.image's cubic",
        "models/resize.py",
        "_A = -0.75",
        "_A = -0.5",
        "interop/test_resize.py::test_positions_are_resized_as_torch_does",
    ),
    # The step.
    Mutant(
        "a teacher sees images without augmentation",
        "training/step.py",
        "teacher.model().outputs(images)",
        'teacher.model().outputs(settings.transform.normalize(batch["image"]))',
        "training/test_step.py::test_a_teacher_sees_what_its_student_sees",
    ),
    Mutant(
        "top-5 is of four",
        "training/step.py",
        "min(5, logits.shape[-1])",
        "min(4, logits.shape[-1])",
        "training/test_step.py::test_top5_counts_the_labels_up_to_the_fifth",
    ),
    Mutant(
        "the average leaves BatchNorm's statistics out",
        "training/step.py",
        "state.ema and optax.incremental_update(model, state.ema, 1 - settings.ema)",
        "optax.incremental_update(model, state.ema, 1 - settings.ema).replace(stats=stats)",
        "training/test_step.py::test_average_covers_parameters_and_batchnorm_statistics",
    ),
    Mutant(
        "the average is not what is evaluated",
        "training/state.py",
        "self.model if self.ema is None else self.ema",
        "self.model",
        "training/test_step.py::test_the_average_is_evaluated",
    ),
    Mutant(
        "gradients of micro-batches are added, not averaged",
        "training/step.py",
        "lambda grad: grad / parts",
        "lambda grad: grad",
        "training/test_step.py::test_accumulation_is_the_whole_batch",
    ),
    Mutant(
        "micro-batches share their random key",
        "training/step.py",
        "jax.random.fold_in(key, index)",
        "key",
        "training/test_step.py::test_micro_batches_of_the_same_images_lose_different_branches",
    ),
    Mutant(
        "the reported loss is the sum over micro-batches",
        "training/step.py",
        "loss / parts * count",
        "loss * count",
        "training/test_step.py::test_accumulation_is_the_whole_batch",
    ),
    Mutant(
        "the reported gradient is the optimizer's update",
        "training/step.py",
        "optax.tree.norm(grads)",
        "optax.tree.norm(updates)",
        "training/test_step.py::test_the_reported_gradient_is_what_sgd_takes",
    ),
    Mutant(
        "evaluation divides by what fills up the last batch too",
        "training/step.py",
        "count = mask.sum()",
        "count = jnp.float32(len(mask))",
        "training/test_step.py::test_eval_step_counts_by_the_mask",
    ),
    Mutant(
        "smoothing spreads over the other classes",
        "training/losses.py",
        "num_classes), smoothing)",
        "num_classes), smoothing * num_classes / (num_classes - 1))",
        "training/test_step.py::test_loss_of_each_head",
    ),
    # The loss of a process.
    Mutant(
        "whoever was paused takes the others for lost",
        "distributed/liveness.py",
        "if newest - seen > _SILENCE",
        "if time.monotonic() - seen > _SILENCE",
        "distributed/test_liveness.py::test_a_pause_of_this_process_is_not_the_loss_of_others",
    ),
    Mutant(
        "a process that counts is lost if it has been there for long",
        "distributed/liveness.py",
        "_counts[other] = count, now",
        "_counts.setdefault(other, (count, now))",
        "distributed/test_liveness.py::test_who_counts_no_longer_is_lost",
    ),
    Mutant(
        "an error of JAX's own is taken for the loss of another process",
        "distributed/failure.py",
        "START_AGAIN if lost else FAILED",
        "START_AGAIN",
        "distributed/test_liveness.py::"
        "test_an_abort_is_to_be_started_again_only_if_another_process_is_lost",
    ),
    # The optimizer.
    Mutant(
        "the cosine ends at 0",
        "training/optimizer.py",
        "alpha=optim.min_lr / optim.lr",
        "alpha=0.0",
        "training/test_optimizer.py::test_schedule_is_timms",
    ),
    Mutant(
        "the cosine runs into the cooldown",
        "training/optimizer.py",
        " - schedule.cooldown",
        "",
        "training/test_optimizer.py::test_schedule_is_timms",
    ),
    Mutant(
        "position embeddings decay",
        "training/optimizer.py",
        '(pos_embed|cls_token|dist_token)$", False',
        '(pos_embed|cls_token|dist_token)$", True',
        "training/test_optimizer.py::test_what_decays",
    ),
    Mutant(
        "the update is clipped, not the gradient",
        "training/optimizer.py",
        "parts.insert(0, ",
        "parts.append(",
        "training/test_optimizer.py::test_adamw_is_torchs",
    ),
    Mutant(
        "the last block has the rate of the head",
        "training/optimizer.py",
        'top = blocks + _count(params, "class_blocks") + 1',
        'top = blocks + _count(params, "class_blocks")',
        "training/test_optimizer.py::test_layers_have_rates_that_decay_downwards",
    ),
    # The host's side of the data.
    Mutant(
        "the shuffle is a rotation",
        "data/pipeline.py",
        "    return tf.raw_ops.RandomIndexShuffle(",
        "    return (position + tf.cast(words[:, 0], tf.int64)) % total\n"
        "    return tf.raw_ops.RandomIndexShuffle(",
        "data/test_pipeline.py::test_images_that_shared_a_batch_meet_again_as_often_as_by_chance",
    ),
    Mutant(
        "repeats are augmented alike",
        "data/pipeline.py",
        "tf.stack([tf.constant(seed, tf.int64), ordinal])",
        "tf.stack([tf.constant(seed, tf.int64), ordinal // repeats])",
        "data/test_pipeline.py::test_repeats_follow_each_other_augmented_anew",
    ),
    Mutant(
        "an image that fills up the last batch is counted",
        "data/pipeline.py",
        "(ordinal < total)",
        "(ordinal <= total)",
        "data/test_pipeline.py::test_evaluation_counts_each_example_once",
    ),
    Mutant(
        "processes take turns in a batch",
        "data/pipeline.py",
        "np.arange(batch_size).reshape(self.count, -1)",
        "np.arange(batch_size).reshape(-1, self.count).T",
        "data/test_pipeline.py::test_processes_together_read_the_global_batch",
    ),
    Mutant(
        "a crop's ratio is uniform, not its logarithm",
        "data/crops.py",
        "tf.exp(tf.random.stateless_uniform([_CROP_ATTEMPTS], seeds[1], *tf.unstack(log_ratio)))",
        "tf.random.stateless_uniform([_CROP_ATTEMPTS], seeds[1], *ratio)",
        "data/test_crops.py::test_crop_boxes_are_inside_and_spread_as_asked",
    ),
    Mutant(
        "a crop never touches the lower border",
        "data/crops.py",
        "seeds[2]) * (spare_h + 1)",
        "seeds[2]) * spare_h",
        "data/test_crops.py::test_a_crop_lies_anywhere_with_the_same_probability",
    ),
    Mutant(
        "the probability of a flip is that of none",
        "data/crops.py",
        "flip_seed) < self.flip",
        "flip_seed) > self.flip",
        "data/test_crops.py::test_flip_happens_with_its_probability",
    ),
    # A run's times, and its end.
    Mutant(
        "input is waited for while the devices are busy",
        "training/timeline.py",
        "self._seconds[STEP] += hidden\n                rest -= hidden",
        "pass",
        "training/test_timeline.py::test_input_is_waited_for_only_while_the_devices_have_nothing_to_do",
    ),
    Mutant(
        "what is traced within a trace is counted twice",
        "training/timeline.py",
        "[span for span in self._compiled if span[0] < start]",
        "self._compiled",
        "training/test_timeline.py::test_each_second_is_of_one_phase",
    ),
    Mutant(
        "a run ends though one process still has time for its checkpoint",
        "distributed/watchdog.py",
        "if any(answer.left > 0",
        "if all(answer.left > 0",
        "distributed/test_watchdog.py::test_a_process_that_still_has_time_is_waited_for",
    ),
    Mutant(
        "a run that stands still before any checkpoint is started for ever",
        "distributed/watchdog.py",
        "START_AGAIN if current.has_saved else FAILED",
        "START_AGAIN",
        "distributed/test_watchdog.py::test_a_process_that_stands_still_ends_with_its_stacks",
    ),
    Mutant(
        "the average is evaluated twice in the place of the weights",
        "training/run.py",
        "[state.best_model, *([state.model] if has_others else [])]",
        "[state.best_model, *([state.best_model] if has_others else [])]",
        "test_train.py::test_the_weights_themselves_are_evaluated_beside_their_average",
    ),
    Mutant(
        "an evaluation of the average alone counts as one of both",
        "train.py",
        "evaluates = None in found",
        "evaluates = found[0] is None",
        "test_train.py::test_the_weights_themselves_are_evaluated_beside_their_average",
    ),
    Mutant(
        "an evaluation that a SIGTERM ended is not made up for",
        "training/checkpoint.py",
        "return step in self._manager.all_steps() and self._manager.metrics(step) is not None",
        "return step in self._manager.all_steps()",
        "test_train.py::test_a_sigterm_during_an_evaluation_is_seen_between_its_batches",
    ),
    # The device's side of the data.
    Mutant(
        "MixUp's λ is uniform",
        "augment/mix.py",
        "jax.random.beta(key, alpha, alpha, (count,))",
        "jax.random.uniform(key, (count,))",
        "augment/test_mix.py::test_mixups_share_has_the_beta_distribution",
    ),
    Mutant(
        "CutMix's side is the share of its area",
        "augment/mix.py",
        "side = jnp.sqrt(1 - keep)",
        "side = 1 - keep",
        "augment/test_mix.py::test_cutmixs_share_is_distributed_as_timms",
    ),
    Mutant(
        "MixToken's λ is 0.5",
        "augment/mix.py",
        "jax.random.uniform(keep_key, (groups,))",
        "jnp.full((groups,), 0.5)",
        "augment/test_mix.py::test_mix_tokens_share_is_distributed_as_timms",
    ),
    Mutant(
        "erasing fills a box with one colour",
        "augment/mix.py",
        "jax.random.normal(keys[5], image.shape)",
        "jax.random.normal(keys[5], (3,))",
        "augment/test_mix.py::test_erasing_fills_a_box_of_timms_sizes_with_noise",
    ),
    Mutant(
        "RandAugment's magnitude is always a little larger",
        "data/augmentation.py",
        "self.std * normal",
        "self.std",
        "data/test_augmentation.py::test_draws_are_distributed_as_timms",
    ),
    Mutant(
        "RandAugment turns and moves one way only",
        "data/augmentation.py",
        "tf.where(uniform[0] < 0.5, 1.0, -1.0)",
        "tf.ones_like(uniform[0])",
        "data/test_augmentation.py::test_draws_are_distributed_as_timms",
    ),
    Mutant(
        "the maps of two warps are multiplied the other way round",
        "data/augmentation.py",
        "else move @ matrix",
        "else matrix @ move",
        "data/test_augmentation.py::test_the_map_says_where_pixels_were",
    ),
    Mutant(
        "a blend of two images is rounded to the nearest",
        "data/colors.py",
        "blended = start + factor * (value - start)",
        "blended = start + factor * (value - start) + np.float32(0.5)",
        "data/test_augmentation.py::test_enhancements",
    ),
    Mutant(
        "the filter of resizing is bicubic with a = -1, as that of warps",
        "data/resampling.py",
        "return (1.5 * x - 2.5) * x * x + 1.0",
        "return (x - 2.0) * x * x + 1.0",
        "data/test_augmentation.py::test_resizing",
    ),
    Mutant(
        "a label map is moved before it is flipped",
        "augment/label_maps.py",
        "    tokens = jnp.where(flips[:, None, None, None], tokens[:, :, ::-1], tokens)\n"
        "    if moves is not None:\n"
        "        tokens = jax.vmap(_move)(tokens, moves)\n",
        "    if moves is not None:\n"
        "        tokens = jax.vmap(_move)(tokens, moves)\n"
        "    tokens = jnp.where(flips[:, None, None, None], tokens[:, :, ::-1], tokens)\n",
        "data/test_token_labels.py::test_labels_are_flipped_before_they_are_moved",
    ),
    # Preflight.
    Mutant(
        "what a fusion only passes on is not read",
        "preflight/cost.py",
        "return None  # the array is the result: whoever runs the computation reads it",
        "return 0",
        "preflight/test_hlo.py::test_what_is_read_through_a_nested_bitcast",
    ),
    Mutant(
        "a nested bitcast reads all of its operand",
        "preflight/cost.py",
        "return any(inner.is_root and inner.name in views for inner in body)",
        "return False",
        "preflight/test_hlo.py::test_what_is_read_through_a_nested_bitcast",
    ),
    Mutant(
        "the padding of tiles is no traffic",
        "preflight/cost.py",
        "_Move(array.allocated if part is None else min(part, array.allocated), array.in_hbm)",
        "_Move(array.nbytes if part is None else min(part, array.nbytes), array.in_hbm)",
        "preflight/test_cost.py::test_traffic_of_known_programs",
    ),
    Mutant(
        "cycles count once, however often their loop runs",
        "preflight/clock.py",
        "seconds=times * seconds,",
        "seconds=seconds,",
        "preflight/test_clock.py::test_cycles_count_as_often_as_loops_run",
    ),
    Mutant(
        "a gather counts each element of its slices",
        "preflight/clock.py",
        "// max(math.prod(sides), 1)",
        "// 1",
        "preflight/test_clock.py::test_what_has_no_cycles_is_estimated_and_said",
    ),
    Mutant(
        "the outermost scope decides",
        "preflight/parts.py",
        'reversed(re.split(r"[/()]", operation))',
        're.split(r"[/()]", operation)',
        "preflight/test_clock.py::test_the_innermost_scope_decides",
    ),
    Mutant(
        "the source line is that of the outermost frame",
        "preflight/stack_frames.py",
        'number = str(int(frames[number].get("parent_frame_id", "0")) - 1)  # 1 is none',
        "break",
        "preflight/test_clock.py::test_what_is_large_and_no_product_is_named_with_its_line",
    ),
    Mutant(
        "Ctrl-C ends the child's compiler when it is done",
        "preflight/child.py",
        "            process.kill()\n            process.join()",
        "            process.join()",
        "preflight/test_child.py::test_ctrl_c_ends_both_at_once",
    ),
    Mutant(
        "a kernel's inner loops run once",
        "preflight/bundles.py",
        "rounds.append(own * rounds[parent])",
        "rounds.append(own)",
        "preflight/test_bundles.py::test_bundles_count_as_often_as_their_loops_run",
    ),
    # Buckets.
    Mutant(
        "a file of a bucket is put in place though its writing was interrupted",
        "atomic.py",
        "            yield temporary\n            paths.put(temporary, path)\n",
        "            try:\n                yield temporary\n"
        "            finally:\n                paths.put(temporary, path)\n",
        "test_paths.py::test_a_file_is_replaced_whole_or_not_at_all",
    ),
    Mutant(
        "a file that is appended to begins anew in a bucket",
        "append_only.py",
        "self._content += path.read_bytes()",
        "path.read_bytes()",
        "test_paths.py::test_a_file_that_grows_in_a_bucket",
    ),
    Mutant(
        "a data set is complete before its files are",
        "paths.py",
        "last.index(name) if name in last else -1",
        "0",
        "test_paths.py::test_what_marks_a_folder_as_complete_is_written_last",
    ),
    Mutant(
        "a data set that is prepared twice is replaced while it is read",
        "paths.py",
        'mode = "overwrite" if replace else "create"',
        'mode = "overwrite"',
        "test_paths.py::test_what_marks_a_folder_as_complete_is_written_last",
    ),
    Mutant(
        "half a checkpoint in a bucket counts",
        "training/checkpoint.py",
        "if ocp.utils.is_checkpoint_finalized(path)]",
        "if path.name]",
        "test_paths.py::test_half_a_checkpoint_is_none_and_a_damaged_one_is_moved_aside",
    ),
    Mutant(
        "images in a bucket are in the order of whole paths",
        "data/folders.py",
        'sorted(names, key=lambda name: name.split("/"))',
        "sorted(names)",
        "test_paths.py::test_a_folder_of_images_is_the_same_in_a_bucket",
    ),
    Mutant(
        "a URL of another place is a folder of this machine",
        "paths.py",
        "    elif _URL.match(text):",
        "    elif text == _URL.pattern:",
        "test_paths.py::test_other_schemes_are_refused",
    ),
    # Export, and the report by class.
    Mutant(
        "padding counts in the confusion matrix",
        "training/step.py",
        'batch["label"], batch["mask"].astype(jnp.int32)',
        'batch["label"], jnp.ones_like(batch["label"])',
        "test_class_report.py::test_the_report_is_scikit_learns",
    ),
    Mutant(
        "the confusion matrix has classes in columns",
        "training/step.py",
        "at[labels, best[:, 0]]",
        "at[best[:, 0], labels]",
        "test_class_report.py::test_the_report_is_scikit_learns",
    ),
    Mutant(
        "precision is of the images of the class",
        "class_report.py",
        "_share(self._right, self._predicted)",
        "_share(self._right, self._count)",
        "test_class_report.py::test_the_report_is_scikit_learns",
    ),
    Mutant(
        "images without a data set are normalised by the mean alone",
        "inference.py",
        "self.config.data.mean, self.config.data.std)",
        "self.config.data.mean, (1.0, 1.0, 1.0))",
        "export/test_export.py::test_programs_give_the_models_logits_without_the_package",
    ),
    Mutant(
        "a program is written whatever logits it gives",
        "export/__main__.py",
        "if not difference < _TOLERANCE[dtype]:",
        "if difference < 0:",
        "export/test_export.py::test_a_program_that_is_wrong_is_not_written",
    ),
    # What heads do.
    Mutant(
        "windows are laid out as if they were not shifted",
        "models/swin.py",
        "return np.asarray(self._partition(numbers, grid))[..., 0] - 1",
        "return np.sort(np.asarray(self._partition(numbers, grid))[..., 0], axis=0) - 1",
        "analysis/test_attention.py::test_windows_are_put_together",
    ),
    Mutant(
        "attention to padding of windows has a distance",
        "analysis/measures.py",
        "jnp.where((layer.patches >= 0)[:, None, None, :], weights, 0)",
        "jnp.where((layer.patches >= -1)[:, None, None, :], weights, 0)",
        "analysis/test_measures.py::test_distances_in_windows_are_those_of_the_image",
    ),
    Mutant(
        "distances are in patches of the layer",
        "analysis/measures.py",
        "layer.stride * mean.sum((1, 3))",
        "mean.sum((1, 3))",
        "analysis/test_measures.py::test_measures_are_those_of_numpy",
    ),
    Mutant(
        "the class token's entropy counts among the patches'",
        "analysis/measures.py",
        "rows = layer.weights[..., layer.num_prefix :, :]",
        "rows = layer.weights",
        "analysis/test_measures.py::test_measures_are_those_of_numpy",
    ),
    Mutant(
        "padding of the last batch counts as images",
        "analysis/measures.py",
        "(measure(layer) * mask[:, None]).sum(0)",
        "measure(layer).sum(0)",
        "analysis/test_measures.py::test_means_do_not_depend_on_the_batches",
    ),
    Mutant(
        "images that do not count are compared",
        "analysis/similarity.py",
        "first = (unit * mask[:, None, None, None, None])",
        "first = unit",
        "analysis/test_similarity.py::test_images_that_do_not_count",
    ),
    Mutant(
        "layers of other windows are compared",
        "analysis/similarity.py",
        "(layer.grid, layer.patches.tobytes(), heads)",
        "(layer.grid, layer.patches.shape, heads)",
        "analysis/test_similarity.py::test_similarity_is_the_cosine_of_rows_of_attention",
    ),
    Mutant(
        "all offsets count alike in the cosine of priors",
        "analysis/priors.py",
        "share = pairs / pairs.sum()",
        "share = np.ones_like(pairs) / pairs.size",
        "analysis/test_priors.py::test_cosines_are_correlations_over_all_pairs",
    ),
    Mutant(
        "heads that look far away are masked",
        "analysis/masks.py",
        "np.flatnonzero(scores >= _GLOBAL)",
        "np.flatnonzero(scores >= 0)",
        "analysis/test_masks.py::test_the_rule",
    ),
    Mutant(
        "MaiT's locality is that of heads after CaiT's second mix",
        "analysis/attention.py",
        "model.attention_maps(images, mix_weights=False)",
        "model.attention_maps(images)",
        "analysis/test_attention.py::test_talking_heads_are_those_before_the_second_mix",
    ),
    Mutant(
        "the first images of a split stand for all",
        "analysis/selection.py",
        "np.arange(number, dtype=np.int64) * total // number",
        "np.arange(number, dtype=np.int64)",
        "test_explain.py::test_masks_are_suggested_by_the_whole_split",
    ),
    Mutant(
        "a page's drawings share their ids",
        "drawing/style.py",
        'rf"\\g<1>{name}-"',
        'r"\\g<1>"',
        "test_explain.py::test_the_page_needs_nothing_else",
    ),
)
