"""Exported programs, run as docs/export.md says, where neither this package nor Flax can be had."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from spvit_jax.errors import InputError
from spvit_jax.export import __main__ as command
from spvit_jax.export import onnx, stablehlo
from spvit_jax.models.naming import map_named
from spvit_jax.training import checkpoint
from tests.helpers import REPOSITORY
from tests.helpers.commands import run
from tests.helpers.variables import random_variables

FORMATS = ("stablehlo", "tf_saved_model", "onnx")
SMALL = {"depth": 2, "dim": 12, "num_heads": 3, "image_size": (16, 24), "patch_size": 4}
CODE = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "docs" / "export.md").read_text(), re.DOTALL
)
# Runs the document's code, and saves what it calls logits.
READER = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("spvit_jax", "flax", "orbax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
import numpy as np

images = np.load("images.npy")
for format, code in zip(sys.argv[1::2], sys.argv[2::2]):
    names = {"images": images}
    exec(code, names)
    np.save(f"{format}.npy", np.asarray(names["logits"]))
    one = {"images": images[:1]}
    exec(code, one)
    np.save(f"{format}-one.npy", np.asarray(one["logits"]))
"""


@pytest.fixture(scope="module")
def variables():
    """A model with a dense head, BatchNorm, a learned gain and masked heads."""
    return random_variables(
        "spvit_s", num_classes=5, **SMALL, stem_width=4, spatial_layers=1, masked_heads=((2, 1),)
    )


@pytest.fixture(scope="module")
def exported(variables, tmp_path_factory):
    """A folder with the weights, and the program in each format."""
    folder = epath.Path(tmp_path_factory.mktemp("export"))
    model = variables.model().config
    checkpoint.save_variables(folder / "weights", variables, model, tuple("abcde"))
    for name in FORMATS:
        done = command.export(folder / "weights", folder / "exported" / name, name)
        assert done.difference < 1e-5
    return folder


def test_programs_give_the_models_logits_without_the_package(exported, variables):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    np.save(exported / "images.npy", images)
    assert len(CODE) == len(FORMATS)
    arguments = [word for pair in zip(FORMATS, CODE, strict=True) for word in pair]
    # -P: nothing of the checkout is on the path.
    subprocess.run([sys.executable, "-P", "-c", READER, *arguments], cwd=exported, check=True)

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = jnp.asarray((images / 255 - mean) / std, jnp.float32)
    expected = np.asarray(jax.jit(lambda v, x: v.model()(x))(variables, normalized))
    assert expected.std() > 0.1
    for name in FORMATS:
        given = np.load(exported / f"{name}.npy")
        assert given.dtype == np.float32
        np.testing.assert_allclose(given, expected, atol=3e-5 * expected.std(), err_msg=name)
        alone = np.load(exported / f"{name}-one.npy")
        np.testing.assert_allclose(alone, expected[:1], atol=3e-5 * expected.std(), err_msg=name)


def test_other_weights_take_their_place(exported, variables):
    """Those of the StableHLO program are a file beside it, under the models' names."""
    folder = exported / "exported" / "stablehlo"
    weights = safetensors.numpy.load_file(folder / "weights.safetensors")
    names = [name.partition("/")[2] for name in leaves(variables)]
    assert sorted(weights) == sorted(names)
    images = np.zeros((2, 16, 24, 3), np.uint8)
    before = stablehlo.load(folder)(images)
    # Logits and half the largest of the dense head's.
    weights["head/bias"] += 1
    weights["dense_head/bias"] += 4
    safetensors.numpy.save_file(weights, folder / "weights.safetensors")
    np.testing.assert_allclose(stablehlo.load(folder)(images), before + 3, rtol=1e-4)


def leaves(variables):
    names = []
    map_named(lambda name, _: names.append(name), variables)
    return names


def test_what_has_to_be_known_is_beside_the_program(exported):
    for name in FORMATS:
        known = json.loads((exported / "exported" / name / "export.json").read_text())
        assert known["format"] == name
        assert known["images"]["shape"] == ["batch", 16, 24, 3]
        assert (known["images"]["crop"], known["images"]["interpolation"]) == (0.875, "bicubic")
        assert known["class_names"] == list("abcde")


def test_the_command(exported, environment):
    output = exported / "again"
    args = (f"--checkpoint={exported}/weights", "--format=stablehlo", f"--output={output}")
    args = (*args, "--dtype=bfloat16", "--platform=tpu", "--platform=cpu")
    lines = run(environment, "export", *args).stdout.splitlines()
    assert lines[-1] == (
        f"wrote     {output}: images uint8 [batch, 16, 24, 3] to logits [batch, 5]"
    )
    written = (output / "program.jax_export").read_bytes()
    assert jax.export.deserialize(bytearray(written)).platforms == ("tpu", "cpu")
    assert b"vit.py" in written
    assert str(REPOSITORY).encode() not in written
    result = run(environment, "export", *args, check=False)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        f"error: {output} exists; choose another --output or remove it",
    )


def test_a_program_that_is_wrong_is_not_written(exported, monkeypatch):
    monkeypatch.setattr(stablehlo, "load", lambda folder: lambda images: np.ones((3, 5)))
    with pytest.raises(FloatingPointError, match=r"nothing was written\. Try another"):
        command.export(exported / "weights", exported / "wrong", "stablehlo")
    assert not (exported / "wrong").exists()


def test_bad_input_is_one_line(exported, monkeypatch):
    with pytest.raises(InputError, match="unknown format 'onx'; did you mean 'onnx'"):
        command.export(exported / "weights", exported / "new", "onx")
    for missing in ("jax2onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(InputError, match=r"ONNX needs .*pip install 'spvit_jax\[onnx\]'"):
                onnx.check_installed()
