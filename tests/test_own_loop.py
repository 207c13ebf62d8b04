"""The example of docs/own_loop.md, run as it stands there but for fewer steps."""

import re

from tests.helpers import REPOSITORY


def test_the_example_learns():
    text = (REPOSITORY / "docs" / "own_loop.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "range(150)" in code
    names = {}
    exec(code.replace("range(150)", "range(30)"), names)
    assert names["accuracy"] > 0.3  # a tenth by chance; 0.9 after all steps
    assert names["logits"].shape == (500, 10)
