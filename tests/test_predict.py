"""Predictions for images in files, against evaluation of the same images."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from spvit_jax import plan
from spvit_jax.augment import mix
from spvit_jax.drawing.predictions import PredictionOnImage, PredictionPictures
from spvit_jax.errors import InputError
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.predict import find_images, predict
from spvit_jax.training import checkpoint
from spvit_jax.training.evaluation import evaluate
from spvit_jax.training.state import Variables
from tests.helpers.commands import run
from tests.helpers.configs import tiny


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty images of two classes, larger than the model's and of other proportions."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(40):
        path = folder / "test" / ("dark", "light")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (20, 30, 3)) + 55 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def config(photographs):
    config = tiny("data")
    config.data.dataset = f"folder:{photographs}"
    config.data.eval_batch_size = 40
    config.augment.eval_crop = 0.8
    return config


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    """Random weights with the classes' names, whose answers depend on the image."""
    model = plan.config_lib.model_settings(config, num_classes=2)
    variables = Variables.of(model.build(CountedRngs(jax.random.key(3))))
    scaled = jax.tree.map(lambda leaf: 3 * leaf, variables)
    workdir = epath.Path(tmp_path_factory.mktemp("weights"))
    checkpoint.save_variables(workdir, scaled, model, ("dark", "light"))
    return workdir


def test_predictions_are_those_of_evaluation(config, weights, photographs):
    images = find_images([str(photographs / "test")])
    found = list(predict(images, weights, config=config, top=2))
    assert [prediction.path for prediction in found] == [str(path) for path in images]
    for prediction in found:
        assert sorted(prediction.classes) == ["dark", "light"]
        assert prediction.probabilities[0] >= prediction.probabilities[1]
        np.testing.assert_allclose(sum(prediction.probabilities), 1, atol=1e-6)
    truth = [epath.Path(prediction.path).parent.name for prediction in found]
    given = [dict(zip(each.classes, each.probabilities, strict=True)) for each in found]
    right = [each.classes[0] == name for each, name in zip(found, truth, strict=True)]
    losses = [-np.log(each[name]) for each, name in zip(given, truth, strict=True)]

    planned = plan.evaluation(config, weights)
    results = evaluate(planned.eval_step, planned.load(), planned.batches(), planned.mesh)
    assert results["count"] == 40
    np.testing.assert_allclose(np.mean(right), results["top1"])
    np.testing.assert_allclose(np.mean(losses), results["loss"], rtol=1e-5)
    # One by one as all together.
    (alone,) = predict(images[7:8], weights, config=config, top=1)
    np.testing.assert_allclose(alone.probabilities[0], found[7].probabilities[0], rtol=1e-5)


def test_the_command(environment, weights, photographs, tmp_path):
    """Without a configuration: the checkpoint knows its model and its classes."""
    image = photographs / "test" / "dark" / "00.png"
    output = tmp_path / "out.json"
    picture = tmp_path / "out.png"
    args = (image, f"--checkpoint={weights}", "--top=1", f"--json={output}", f"--picture={picture}")
    lines = run(environment, "predict", *args).stdout.splitlines()
    assert lines[0] == str(image)
    assert lines[1].split()[1] in ("dark", "light")
    (record,) = json.loads(output.read_text())
    assert record["path"] == str(image)
    assert lines[1].split()[0] == f"{100 * record['probabilities'][0]:.1f}%"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_is_that_of_the_class_token(config, weights, photographs):
    """In a model of one layer, row 0 of its attention, on the patches."""
    images = find_images([str(photographs / "test")])[:2]
    found = list(predict(images, weights, config=config, attention=True))
    model = plan.evaluation(config, weights).load().model()
    for prediction in found:
        pixels, attention, meaning = prediction.attention
        assert meaning == "what the class token attends to in layer 0"
        normalised = mix.normalize(pixels[None], config.data.mean, config.data.std)
        (expected,) = model.attention_maps(normalised)
        expected = np.asarray(expected.weights)[0, :, 0, 1:].reshape(3, 6, 6)
        np.testing.assert_allclose(attention, expected, rtol=1e-5)
        assert prediction.record().keys() == {"path", "classes", "probabilities"}


def test_pictures(config, weights, photographs, tmp_path):
    """All images in one file, or each in one of its own; two of one name have two."""
    images = [*find_images([str(photographs / "test")])[:2]] * 2
    found = list(predict(images, weights, config=config, top=2, attention=True))
    shown = [PredictionOnImage(*each[:3], *each.attention) for each in found]
    for target in (tmp_path / "all.png", tmp_path / "folder"):
        pictures = PredictionPictures(epath.Path(target), images)
        for each in shown:
            pictures.add(each)
        pictures.finish()
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {"00_0.png", "02_1.png", "00_2.png", "02_3.png"}
    sizes = [Image.open(path).size for path in (tmp_path / "all.png", tmp_path / "folder/00_0.png")]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] > 3 * sizes[1][1]
    with pytest.raises(InputError, match=r"photo.jpg is no PNG file; expected a name that ends"):
        PredictionPictures(epath.Path(tmp_path / "photo.jpg"), images)
    with pytest.raises(InputError, match=r"would hold 36 images; one file takes 32: name a folder"):
        PredictionPictures(epath.Path(tmp_path / "all.png"), images * 9)


def test_what_is_no_image_is_one_line(config, weights, tmp_path):
    text = tmp_path / "notes.jpg"
    text.write_text("not an image")
    with pytest.raises(InputError, match=r"notes.jpg cannot be read as an image; expected JPEG"):
        list(predict([epath.Path(text)], weights, config=config))
    with pytest.raises(InputError, match="there is no image"):
        find_images([str(tmp_path / "nothing.png")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images of"):
        find_images([str(tmp_path / "empty")])
