"""The five commands of docs/finetuning.md, as they stand there, on real images in a folder."""

import json
import re
import shlex

import numpy as np
import pytest
from etils import epath
from PIL import Image
from sklearn.datasets import load_digits

from spvit_jax import convert
from tests.helpers import REPOSITORY
from tests.helpers.commands import run
from tests.helpers.hub_server import serving
from tests.helpers.variables import random_variables

TEXT = (REPOSITORY / "docs" / "finetuning.md").read_text()
COMMANDS = [
    shlex.split(lines.replace("\\\n", ""))
    for lines in re.findall(r"^    (spvit-jax (?:.*\\\n)*.*)\n", TEXT, re.MULTILINE)
]
TINY = {"depth": 1, "dim": 12, "num_heads": 3, "patch_size": 8}
# The document's model, a step at a time.
QUICK = [
    *(f"--config.model.{name}={value}" for name, value in (TINY | {"image_size": 16}).items()),
    "--config.data.batch_size=8",
    "--config.data.eval_batch_size=8",
    "--config.schedule.total=2 steps",
    "--config.schedule.warmup=0 steps",
    "--config.compilation_cache=off",
]
NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are started: handwritten digits of three classes as PNG files."""
    folder = tmp_path_factory.mktemp("finetuning")
    images, labels = load_digits(return_X_y=True)
    for name, number in zip(NAMES, range(3), strict=True):
        found = images[labels == number].reshape(-1, 8, 8)[:13]
        for index, image in enumerate(np.uint8(found * 255 / 16)):
            split = "train" if index < 8 else "validation" if index < 12 else "new"
            path = folder / "photos" / split / name / f"{index}.png"
            if split == "new":
                path = folder / "new_photos" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((20, 24)).save(path)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with weights of a thousand classes under the name that the document has."""
    folder = tmp_path_factory.mktemp("hub")
    repository = epath.Path(folder) / "timm" / "deit_small_patch16_224.fb_in1k"
    repository.mkdir(parents=True)
    variables = random_variables("deit_s", image_size=16, **TINY)
    model = variables.model().config
    convert.write_torch(repository / "model.safetensors", variables, model, dialect="timm")
    with serving(folder) as (address, _):
        yield {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home")}


def test_the_five_commands(folder, hub, environment):
    assert [words[1] for words in COMMANDS] == ["train", "train", "evaluate", "predict", "export"]
    environment = environment | hub
    said = []
    for _, name, *words in COMMANDS:
        paths = ("photos", "new_photos", "runs/", "exported/")
        words = [re.sub(rf"(^|=)({'|'.join(paths)})", rf"\1{folder}/\2", word) for word in words]
        said.append(run(environment, name, *words, *(QUICK if name == "train" else [])))
    dry, trained, evaluated, predicted, _ = said
    assert "nothing was written" in dry.stderr
    for result in (dry, trained):
        assert "24 to train on, 12 to evaluate on" in result.stderr
        assert "model.safetensors" in result.stderr
    assert "from /" in re.search("start .*", trained.stderr)[0]

    assert json.loads(evaluated.stdout)["count"] == 12
    report = json.loads((folder / "runs/photos/report/report.json").read_text())
    assert [each["name"] for each in report["classes"]] == sorted(NAMES)
    assert (folder / "runs/photos/report/confusion.png").is_file()
    lines = predicted.stdout.splitlines()
    assert [line for line in lines if line.endswith(".png")] == [
        f"{folder}/new_photos/{name}.png" for name in sorted(NAMES)
    ]
    assert {line.split()[-1] for line in lines if "%" in line} == set(NAMES)
    known = json.loads((folder / "exported/photos/export.json").read_text())
    assert known["class_names"] == sorted(NAMES)
