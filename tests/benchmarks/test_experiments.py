"""Experiments on digits: their runs are possible ones, and their tables say what was measured."""

import copy
import dataclasses
import importlib
import itertools
import json
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import (
    collect,
    convergence,
    experiment,
    low_data,
    mait_ablation,
    markdown,
    permuted,
    precision,
    spvit_ablation,
)
from benchmarks.runs import SEEDS, Record, Run
from spvit_jax import config as config_lib
from spvit_jax import models
from spvit_jax.errors import InputError
from spvit_jax.models.complexity import count_parameters
from tests.helpers import REPOSITORY
from tests.helpers.configs import digits
from tests.helpers.variables import random_variables
from tests.helpers.variables import run as run_model


@pytest.fixture
def permuted_patches(monkeypatch):
    """The module that registers models; afterwards the registry is as it was before."""
    for name in ("_MODELS", "_OWN_PROTOCOLS", "FAMILIES"):
        monkeypatch.setattr(models, name, copy.copy(getattr(models, name)))
    monkeypatch.delitem(sys.modules, "benchmarks.permuted_patches", raising=False)
    return importlib.import_module("benchmarks.permuted_patches")


def config_of(run):
    """The configuration of a run, as the command line reads it."""
    path = f"{REPOSITORY / 'configs' / 'digits.py'}:{run.recipe}"
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["", f"--config={path}", *(f"--config.{change}" for change in run.changes)]
    with mock.patch.object(sys, "argv", argv):  # where the flag looks for changes
        values(argv)
    return values.config


def test_every_run_has_a_model_and_its_own_folder(permuted_patches):
    variants = [
        convergence.VARIANTS,
        low_data.VARIANTS,
        mait_ablation.VARIANTS,
        permuted.VARIANTS,
        *(variants for _, variants in precision.EXPERIMENTS.values()),
        *(variants for _, variants in spvit_ablation.EXPERIMENTS.values()),
    ]
    runs = {run for group in variants for runs in group.values() for run in runs}
    assert len({run.folder for run in runs}) == len(runs)
    models_of = {}
    for run in runs:
        if run.seed == 0:
            config = config_of(run)
            model = config_lib.model_settings(config, num_classes=10)
            fields = (run.recipe, run.steps, run.start is None, config.optim.lr)
            models_of.setdefault((model, *fields), []).append(run)
    # No two experiments train the same under different settings.
    assert [runs for runs in models_of.values() if len(runs) > 1] == []


SMALL = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}


def test_all_patches_are_there_in_another_order(permuted_patches):
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    shuffled = permuted_patches.permute(images, (2, 3), seed=1)

    def patches(images):
        for image in np.asarray(images):
            places = itertools.product((0, 4), (0, 4, 8))
            yield [image[y : y + 4, x : x + 4].tobytes() for y, x in places]

    before, after = list(patches(images)), list(patches(shuffled))
    order = [before[0].index(patch) for patch in after[0]]
    assert sorted(order) == list(range(6)) != order
    assert [before[1][place] for place in order] == after[1]


@pytest.mark.parametrize(
    ("name", "settings", "same"),
    [
        ("deit_ti", {"depth": 2}, True),
        ("lvvit_t", {"depth": 1, "stem_width": 8}, False),
        ("mait_t", {"depth": 2, "masked_heads": (3, 0)}, False),
        ("spvit_s", {"depth": 2, "stem_width": 0, "spatial_layers": 1, "pos_conv": False}, False),
    ],
)
def test_a_vit_without_positions_loses_nothing(name, settings, same, permuted_patches):
    """Nothing but positions tells it where a patch is; stem, masks and prior do in the others."""
    base = random_variables(name, **SMALL, **settings)
    base.params["pos_embed"].set_value(0 * base.params["pos_embed"].get_value())
    other = random_variables(f"permuted_{name}", **SMALL, **settings)
    other = other.replace(params=base.params, stats=base.stats)
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    logits, permuted_logits = run_model(base, images), run_model(other, images)
    difference = abs(logits - permuted_logits).max() / logits.std()
    assert (difference < 1e-5) if same else (difference > 1e-2)


def records_of(variants, accuracies):
    """Records of the runs of each variant, as many as accuracies are given."""
    return {
        run: Record(run, (1, 2), (0.1, value), (0.1, value - 0.02), 1.0, "abc")
        for name, runs in variants.items()
        for run, value in zip(runs, accuracies.get(name, ()), strict=False)
    }


def test_the_table_has_means_errors_and_differences_seed_by_seed():
    variants = {name: experiment.seeds(name) for name in ("a", "b", "c", "d")}
    records = records_of(
        variants, {"a": (0.9, 0.92, 0.94, 0.96, 0.98), "b": (0.95, 0.93), "c": (0.7,)}
    )
    # The standard deviation of 90, 92, …, 98 is √10; of 95 − 90 and 93 − 92 it is √8.
    assert experiment.table(variants, records, "a", "kind").splitlines() == [
        "| kind | top-1 | of the weights themselves | against a |",
        "|---|---|---|---|",
        "| a | 94.0 ± 1.4 | 92.0 ± 1.4 |  |",
        "| b | 94.0 ± 1.0 (2 of 5 seeds) | 92.0 ± 1.0 (2 of 5 seeds) | +3.0 ± 2.0 (2 of 5 seeds) |",
        "| c | 70.0 (1 of 5 seeds) | 68.0 (1 of 5 seeds) | -20.0 (1 of 5 seeds) |",
        "| d | not run yet | not run yet | not run yet |",
    ]
    shuffled = variants | {"b": variants["b"][1::-1]}
    assert experiment.table(shuffled, records, "a").splitlines()[3].split("|")[4] == (
        " +3.0 ± 2.0 (2 of 5 seeds) "
    )


def test_pictures_and_tables_of_what_there_is(tmp_path):
    accuracies = {"vit, 400 steps": (0.8, 0.9), "mait, 1600 steps": (0.9,)}
    records = records_of(convergence.VARIANTS, accuracies)
    convergence.plot(convergence.VARIANTS, records, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = convergence.table(convergence.VARIANTS, records).splitlines()
    assert lines[2].startswith("| `vit` | 85.0 ± 5.0 (2 of 5 seeds) | 83.0 ± 5.0 (2 of 5 seeds) |")
    accuracies = {"mait": (0.9, 0.91), "mait, permuted": (0.8, 0.83)}
    lines = permuted.table(records_of(permuted.VARIANTS, accuracies)).splitlines()
    assert lines[5].endswith("| -9.0 ± 1.0 (2 of 5 seeds) |")


def test_a_table_goes_between_its_marks(tmp_path):
    path, marks = tmp_path / "a.md", markdown.marks("one")
    path.write_text("A\n<!-- one -->old<!-- end of one -->\nB <!-- two --><!-- end of two -->\n")
    markdown.replace_between(marks, "| new |", path)
    expected = (
        "A\n<!-- one -->\n\n| new |\n\n<!-- end of one -->\nB <!-- two --><!-- end of two -->\n"
    )
    assert path.read_text() == expected
    for wrong in ("nothing", "<!-- end of one --> <!-- one -->", expected + "<!-- one -->"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="does not have <!-- one -->"):
            markdown.replace_between(marks, "", path)
        assert path.read_text() == wrong
    document = (REPOSITORY / "docs" / "claims.md").read_text()
    names = ("convergence", "mait_ablation", "permuted", "mask_search", "low_data", "token_labels")
    for name in (*names, *spvit_ablation.EXPERIMENTS):
        assert [document.count(mark) for mark in markdown.marks(name)] == [1, 1], name


def workdir(path, top1, step=8, **changes):
    """The files of a run that `collect` reads."""
    config = digits("vit")
    config.schedule.update(total="8 steps", warmup="0 steps")
    config.update_from_flattened_dict(changes)
    path.mkdir()
    resolved = config_lib.resolve(config, num_examples=1297)
    (path / "config.json").write_text(config_lib.to_json(resolved))
    (path / "classes.json").write_text(json.dumps([str(digit) for digit in range(10)]))
    lines = [{"step": 4, "eval/top1": 0.1}, {"step": step, "eval/top1": top1}, {"step": step}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_runs_that_differ_in_their_seed_are_one_point(tmp_path):
    folders = [
        workdir(tmp_path / "0", 0.9),
        workdir(tmp_path / "1", 0.94, seed=1),
        workdir(tmp_path / "2", 0.5, step=6, **{"model.dim": 96, "data.threads": 3}),
    ]
    points = collect.points([collect.Collected.of(folder) for folder in folders])
    assert [point.name for point in points] == ["deit_ti, dim 48", "deit_ti, dim 96"]
    assert points[0].top1 == pytest.approx([90, 94])
    model = config_lib.model_settings(digits("vit"), num_classes=10)
    assert points[0].parameters == count_parameters(model)
    assert points[1].parameters == count_parameters(dataclasses.replace(model, dim=96))
    assert points[1].macs > 3 * points[0].macs > 0
    first, second = collect.table(points).splitlines()[2:]
    assert first.endswith(" 92.0 ± 2.0 |")
    assert second.endswith(" 50.0, after 6 of 8 steps |")
    collect.plot(points, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_a_run_are_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a run"):
        collect.Collected.of(tmp_path)
    path = workdir(tmp_path / "0", 0.9)
    (path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    with pytest.raises(InputError, match="has not been evaluated yet"):
        collect.Collected.of(path)


def test_seeds_are_five():
    assert [run.seed for run in experiment.seeds("vit")] == list(SEEDS)
    starts = [Run("a", seed, 1) for seed in SEEDS]
    assert [run.start for run in experiment.seeds("vit", start=starts)] == starts
