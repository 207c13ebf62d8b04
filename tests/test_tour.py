"""The notebook docs/tour.ipynb: its cells run in their order, with fewer steps of training."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.helpers import REPOSITORY

NOTEBOOK = json.loads((REPOSITORY / "docs" / "tour.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def no_windows(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")


@pytest.mark.usefixtures("no_windows")
def test_it_runs():
    names = {}
    text = "\n".join("".join(cell["source"]) for cell in CODE)
    assert "steps = 150" in text
    exec(compile(text.replace("steps = 150", "steps = 60"), "docs/tour.ipynb", "exec"), names)
    assert names["accuracy"] > 0.3  # a tenth by chance; 0.9 after all steps
    kernels = [names[model].blocks[2].attn.qkv.kernel[...] for model in ("model", "larger")]
    np.testing.assert_array_equal(*kernels)
    assert names["looks"].shape == (5, 6, 6)
    assert len(plt.get_fignums()) == 2


def test_what_it_printed_is_in_it():
    """As it was run last, from the first cell to the last, without an error."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
