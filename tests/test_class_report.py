"""The report of an evaluation by class, against scikit-learn on the same predictions."""

import json

import numpy as np
import pytest
from etils import epath
from sklearn import metrics
from sklearn.datasets import load_digits

from spvit_jax import plan
from spvit_jax.class_report import ClassReport
from spvit_jax.errors import InputError
from spvit_jax.evaluate import evaluate_checkpoint
from spvit_jax.models.naming import map_named
from spvit_jax.training import checkpoint
from tests.helpers.configs import tiny
from tests.helpers.variables import random_variables, run


@pytest.fixture(scope="module")
def config(data_dir):
    config = tiny(data_dir)
    config.data.eval_batch_size = 72  # the last of seven batches is padded
    return config


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    """Random weights for which no class is the likeliest of all images."""
    fields = {name: value for name, value in config.model.items() if value is not None}
    variables = random_variables(fields.pop("name"), num_classes=10, **fields)
    digits = np.pad(load_digits().images[:200] / 8 - 1, ((0, 0), (2, 2), (2, 2)), mode="edge")
    mean = run(variables, np.repeat(digits[..., None], 3, axis=-1)).mean(axis=0)
    variables = map_named(
        lambda name, leaf: leaf - mean if name == "params/head/bias" else leaf, variables
    )
    workdir = epath.Path(tmp_path_factory.mktemp("weights"))
    model = variables.model().config
    checkpoint.save_variables(workdir, variables, model, tuple("0123456789"))
    return workdir


def test_the_report_is_scikit_learns(config, weights, tmp_path):
    results = evaluate_checkpoint(config, weights, report=epath.Path(tmp_path / "report"))
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        *("report.json", "classes.png", "confusion.png")
    }
    report = json.loads((tmp_path / "report" / "report.json").read_text())

    # The same predictions, from one batch of all images.
    planned = plan.evaluation(config, weights)
    with planned.batches(500) as batches:
        (batch,) = batches
    kept = batch["mask"] > 0
    images = (batch["image"][kept] / 255 - 0.5) / 0.5
    labels = batch["label"][kept]
    logits = np.asarray(run(planned.load(), images.astype(np.float32)))
    predicted = logits.argmax(-1)

    assert len(np.unique(predicted)) > 3
    np.testing.assert_array_equal(report["confusion"], metrics.confusion_matrix(labels, predicted))
    expected = metrics.classification_report(labels, predicted, output_dict=True, zero_division=0)
    assert report["count"] == results["count"] == 500
    assert report["top1"] == pytest.approx(expected["accuracy"])
    assert report["top1"] == pytest.approx(results["top1"])
    assert report["mean_class_top1"] == pytest.approx(expected["macro avg"]["recall"])
    assert [each["name"] for each in report["classes"]] == list("0123456789")
    for number, each in enumerate(report["classes"]):
        theirs = expected[str(number)]
        assert each["count"] == theirs["support"]
        assert each["top1"] == pytest.approx(theirs["recall"])
        assert (each["precision"] or 0) == pytest.approx(theirs["precision"])
        of_class = labels == number
        top5 = metrics.top_k_accuracy_score(labels, logits, k=5, sample_weight=of_class)
        assert each["top5"] == pytest.approx(top5)


def test_several_labels_have_no_confusion(config, weights, tmp_path, monkeypatch):
    planned = plan.evaluation(config, weights)
    monkeypatch.setattr(planned.source, "several_labels", True)
    monkeypatch.setattr(plan, "evaluation", lambda *args, **settings: planned)
    with pytest.raises(InputError, match="several labels for an image, and a report by class"):
        evaluate_checkpoint(config, weights, report=epath.Path(tmp_path / "report"))


def confused(classes, seed=0):
    """Random counts of many classes, of which the first has no example and the last is perfect."""
    rng = np.random.default_rng(seed)
    confusion = np.diag(rng.integers(20, 50, classes))
    rows, columns = rng.integers(1, classes - 1, (2, 10 * classes))
    np.add.at(confusion, (rows, columns), 1)
    confusion[0] = 0
    confusion[5, 7] = 60
    return ClassReport(confusion, np.diagonal(confusion), [f"class {n}" for n in range(classes)])


def texts(figure):
    """What is written on the axes of a figure: ticks, labels and bars."""
    figure.canvas.draw()
    found = [text for axis in figure.axes for text in (*axis.texts, *axis.get_yticklabels())]
    return [text.get_text() for text in found]


@pytest.mark.parametrize("classes", [10, 1000])
def test_pictures_show_what_is_most_confused(classes):
    report = confused(classes)
    written = report.to_dict()
    assert written["classes"][0]["top1"] is None
    assert written["confusions"][0] == {
        "label": "class 5",
        "predicted": "class 7",
        "count": 60,
        "share": pytest.approx(60 / written["classes"][5]["count"]),
    }
    json.dumps(written, allow_nan=False)
    pairs, accuracies = texts(report.draw_confusions()), texts(report.draw_accuracies())
    assert "class 5 → class 7" in pairs if classes == 1000 else "60" in pairs
    assert "class 5" in accuracies  # the worst
    assert "class 0" not in accuracies  # without examples
    assert len(pairs) < 130
