"""What quickstart.sh and test.sh begin with: a virtual environment, in any folder."""

import shutil
import subprocess

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.pod import script

# Answers as the version that it is told to be, and makes environments of copies of itself.
PYTHON = """
echo "$*" >>"$(dirname "$0")/calls"
case $1 in
  -c) [[ ! -e $(dirname "$0")/old ]] ;;
  -m)
    case $2 in
      venv)
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
        [[ ! -e $(dirname "$0")/no-ensurepip ]]
        ;;
      pip) [[ ! -e $(dirname "$0")/no-pip ]] ;;
    esac
    ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with blanks in its path, and a Python that is not on the PATH."""
    checkout = tmp_path / "a check out"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(REPOSITORY / "launch/environment.sh", checkout / "launch")
    (checkout / "requirements.txt").write_text("jax\n")
    (checkout / "requirements-tpu.txt").write_text("libtpu\n")
    (tmp_path / "my python").mkdir()
    script(tmp_path / "my python/python", PYTHON)
    return checkout


def prepare(checkout, *files, code=0):
    """Sources the file as the scripts do, from somewhere else; returns what was said."""
    command = 'source "$0/launch/environment.sh" "$@" && pwd && echo "$TMPDIR"'
    result = subprocess.run(
        ["bash", "-c", command, checkout, *(files or ["requirements.txt"])],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(checkout.parent / "my python/python")},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stderr
    return result.stdout + result.stderr


def installs(checkout):
    calls = (checkout / ".venv/bin/calls").read_text().splitlines()
    return [call.split()[-1] for call in calls if call.startswith("-m pip install")]


def test_each_requirements_file_is_installed_once_per_content(checkout):
    said = prepare(checkout)
    assert "making a virtual environment" in said
    assert said.splitlines()[-2:] == [str(checkout), f"{checkout}/.venv/tmp"]
    assert "note: PYTHON is not used, since .venv is there" in prepare(checkout)
    prepare(checkout, "requirements-tpu.txt")
    assert installs(checkout) == ["requirements.txt", "requirements-tpu.txt"]
    (checkout / "requirements.txt").write_text("jax==1\n")
    prepare(checkout)
    assert installs(checkout)[2:] == ["requirements.txt"]


def test_a_second_file_is_installed_without_what_it_requires(checkout):
    prepare(checkout, "requirements.txt", "requirements-onnx.txt")
    *_, first, second = (checkout / ".venv/bin/calls").read_text().splitlines()
    assert first == "-m pip install --quiet -r requirements.txt"
    assert second == "-m pip install --quiet --no-deps -r requirements-onnx.txt"


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("old", "my python/python is not Python 3.11 or newer; set PYTHON"),
        ("no-ensurepip", "it needs the package python3-venv"),
    ],
)
def test_a_python_that_does_not_do_leaves_nothing_behind(checkout, lacks, words):
    (checkout.parent / "my python" / lacks).touch()
    said = prepare(checkout, code=2)
    assert words in said
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("lacks", ["old", "no-pip"])
def test_half_an_environment_is_not_taken_for_one(checkout, lacks):
    prepare(checkout)
    (checkout / ".venv/bin" / lacks).touch()
    assert f"error: {checkout}/.venv is not whole" in prepare(checkout, code=2)
