"""The package as it is installed: the wheel, its command, and what that says of itself."""

import itertools
import os
import re
import subprocess
import sys
import tomllib

import pytest

from spvit_jax import catalog
from spvit_jax import config as config_lib
from spvit_jax.__main__ import COMMANDS
from spvit_jax.models import list_models, model_config
from spvit_jax.models.complexity import count_parameters
from tests.helpers import REPOSITORY
from tests.helpers.commands import SMALL, run

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_all_packages_are_in_the_wheel():
    """They are named one by one, since the recipes come from another folder."""
    folders = {path.parent for path in (REPOSITORY / "spvit_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names | {"spvit_jax.configs"}


def test_what_is_required_is_what_is_tested_with():
    def names(lines):
        texts = [line.partition("#")[0].strip() for line in lines]
        return {text.replace(">", "=").partition("=")[0].lower() for text in texts if text}

    pinned = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert names(PROJECT["project"]["dependencies"]) == names(pinned)


def test_extras_that_errors_name_exist():
    texts = [path.read_text() for path in (REPOSITORY / "spvit_jax").rglob("*.py")]
    named = {extra for text in texts for extra in re.findall(r"spvit_jax\[(\w+)\]", text)}
    assert named == {"hub", "onnx", "torch", "tpu", "wandb"}
    assert named < set(PROJECT["project"]["optional-dependencies"])


def test_the_wheel_trains_from_another_folder(environment, data_dir, tmp_path):
    """Installed where the checkout is not: the command, a recipe by its name, a checkpoint."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    source = tmp_path / "source"  # setuptools builds in the folder itself
    for name in ("spvit_jax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        (source / name).symlink_to(REPOSITORY / name)
    install = [*pip, "install", "--no-deps", "--no-build-isolation", "--target", site, source]
    subprocess.run(install, check=True, cwd=here, env=environment)

    installed = environment | {"PYTHONPATH": str(site), "PATH": f"{site}/bin:{os.environ['PATH']}"}
    settings = [
        *SMALL,
        f"--config.data.data_dir={data_dir}",
        "--config.schedule.total=2 steps",
        "--config.schedule.warmup=0 steps",
    ]
    result = subprocess.run(
        ["spvit-jax", "train", "--config=digits:vit", *settings, "--workdir=run"],
        cwd=here,
        env=installed,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (here / "run" / "checkpoints" / "2").is_dir()
    where = "import spvit_jax; print(spvit_jax.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=here, env=installed)
    assert found.decode().startswith(str(site))


def test_help_is_in_the_words_of_the_caller(environment):
    """Examples as the command was called, all of a continued line, and nothing of absl's own."""
    lines = run(environment, "__main__", "convert", "--help").stdout.splitlines()
    first = "    spvit-jax convert --arch=spvit_s --input=spvit_s.pth.tar --output=weights/384 \\"
    assert lines[lines.index(first) + 1] == "        --image_size=384"
    (required,) = [line for line in lines if line.startswith("  --input ")]
    assert required.endswith("hf:OWNER/REPO. Required.")
    said = run(environment, "__main__", "export", "--help").stdout
    assert "May be given several times. Default: cpu, cuda, tpu." in " ".join(said.split())
    assert "repeat this option" not in said
    said = run(environment, "__main__", "evaluate", "--help").stdout
    assert "\n    spvit-jax evaluate --config=spvit:s,384 --checkpoint=spvit_s.pth.tar\n" in said
    assert "Required, unless the checkpoint is of a run." in " ".join(said.split())
    said = run(environment, "__main__", "token-labels", "--help").stdout
    assert "\n    spvit-jax token-labels pack --dataset=imagenet2012 --labels=DIR" in said


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *[("train", "workdir"), ("evaluate", "report"), ("predict", "top"), ("explain", "output")],
        *[("convert", "arch"), ("export", "format"), ("preflight", "topology")],
        *[("prepare", "dataset"), ("list", None)],
    ],
)
def test_help_begins_with_the_command_and_its_own_flags(name, own, environment):
    module = COMMANDS[name].removeprefix("spvit_jax.").removesuffix(".__main__")
    lines = run(environment, module, "--help").stdout.splitlines()
    assert lines[0].startswith(f"usage: python -m spvit_jax.{module} ")
    assert any(line.startswith("    ") and name in line for line in lines), "an example"
    assert not any("spvit_jax.cli" in line or "absl" in line for line in lines)
    if own is None:
        assert "flags:" not in lines
        return
    flags = [line.split()[0] for line in lines[lines.index("flags:") + 1 :] if "  --" in line]
    assert "--config" not in flags[1:]
    assert f"--{own}" in itertools.takewhile(lambda flag: flag != "--import", flags)


def test_the_command_names_what_it_knows(environment):
    commands = run(environment, "__main__", "--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in commands
    result = run(environment, "__main__", "trian", check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "error: unknown command 'trian'; did you mean 'train'?\n",
    )
    assert run(environment, "train", "--version").stdout.startswith("spvit_jax ")


def test_a_missing_flag_is_one_line(environment):
    result = run(environment, "train", check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "error: --config and --workdir must be given; --help shows an example\n"
    )


def test_recipes_are_found_by_name(environment):
    result = run(environment, "train", "--config=spvitt:s", "--workdir=w", check=False)
    assert "and no recipe of this name; did you mean 'spvit'?" in result.stderr


def test_every_field_has_a_meaning():
    fields = config_lib.flatten(config_lib.base().to_dict())
    meanings = catalog.field_meanings()
    assert fields.keys() <= meanings.keys()
    assert meanings["optim.b1"] == "Adam's decay of the first moment"
    assert len(list(catalog.fields("optim.*"))) == len([f for f in fields if "optim." in f])


def test_lists():
    (line,) = catalog.models("spvit_s")
    assert line.split()[:2] == ["spvit_s", f"{count_parameters(model_config('spvit_s')) / 1e6:.2f}"]
    assert len(list(catalog.configs())) == len(list((REPOSITORY / "configs").glob("*.py")))
    assert "v5e" in next(catalog.topologies("v5e"))
    assert list(catalog.models("nothing*")) == []
    assert len(list_models()) > 20


def test_a_pattern_that_matches_nothing_is_one_line(environment):
    result = run(environment, "catalog", "models", "vgg*", check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no models match 'vgg*'; ")
