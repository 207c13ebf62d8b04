"""The layers of the package: which parts may import which, and where TensorFlow is.

A part imports parts below it, or of its own; nothing imports upwards, and there is no cycle.
"""

import ast
import re
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

PACKAGE = REPOSITORY / "spvit_jax"
# From the bottom up; parts of one layer know nothing of each other.
LAYERS = (
    {"errors", "help"},
    {"paths"},
    {"atomic", "append_only"},
    {"classes", "kernels"},
    {"models"},
    {"distributed"},
    {"logs", "config"},
    {"compilation_cache", "recipes", "augment", "interop"},
    {"training", "data"},
    {"weights", "analysis"},
    {"drawing"},
    {"preflight", "page"},
    {"plan", "inference", "class_report"},
    {"export"},
    {"cli"},
    {"train", "evaluate", "predict", "explain", "convert", "catalog"},
    {"__main__"},
)
# Commands that live beside what they are about.
COMMANDS = {
    "export/__main__.py",
    "preflight/__main__.py",
    "data/prepare.py",
    "data/token_labels/__main__.py",
}
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def part_of(path):
    name = str(path.relative_to(PACKAGE))
    return "train" if name in COMMANDS else name.split("/")[0].removesuffix(".py")


def imported(path):
    """The parts of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "spvit_jax":
            names = [f"spvit_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.startswith("spvit_jax."):
                yield name.split(".")[1]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    own = part_of(path)
    for other in set(imported(path)) - {own}:
        assert HEIGHT[other] < HEIGHT[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_no_drawers(path):
    assert len(path.read_text().splitlines()) <= 400


def test_only_data_imports_tensorflow():
    """And the module that writes TensorFlow's own format."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if re.search(r"^\s*(import|from) tensorflow\b", path.read_text(), re.MULTILINE)
    }
    assert found == {"data/tensorflow.py", "export/saved_model.py"}


def test_only_data_needs_tensorflow():
    """Models, training and the kernels run on a machine that has JAX alone."""
    parts = ("analysis", "augment", "distributed", "interop", "models", "training")
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in FILES
        if part_of(path) in (*parts, "weights")
    ]
    code = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        "assert not {'tensorflow', 'tensorflow_datasets', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
