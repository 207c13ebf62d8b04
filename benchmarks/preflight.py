"""Preflights the recipes of SP-ViT and MaiT on several TPU topologies, and tabulates them.

    python -m benchmarks.preflight

Runs the command that a user types, once for each recipe and topology, the most important first, and
keeps its JSON file. A recipe and topology with a file is not compiled again, so that this can be
stopped and continued; take another folder, or remove the files, when the step has changed. The
table goes between the two marks in a Markdown file, with a row for each JSON file.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

from benchmarks import markdown
from spvit_jax.preflight import report

# Config files, each with its model and pixels in the table, the most important first.
RECIPES = {
    "spvit.py:s": ("SP-ViT-S", 224),
    "spvit.py:s,384": ("SP-ViT-S", 384),
    "spvit.py:m": ("SP-ViT-M", 224),
    "spvit.py:m,384": ("SP-ViT-M", 384),
    "spvit.py:l": ("SP-ViT-L", 224),
    "spvit.py:l,384": ("SP-ViT-L", 384),
    "mait.py:s": ("MaiT-S", 224),
}
# Topologies, each with the batch size where it is not the recipe's.
TOPOLOGIES = {"v5e:4x4": None, "v6e:4x4": None, "v5p:2x2x2": None, "v5e:16x16": 4096}
PAIRS = [(recipe, topology) for topology in TOPOLOGIES for recipe in RECIPES]
MARKS = "<!-- table -->", "<!-- end of the table -->"  # in the Markdown file
GIB = 2**30


def command(recipe: str, topology: str, output: pathlib.Path) -> list[str]:
    """Returns the command that preflights one recipe on one topology."""
    batch_size = TOPOLOGIES[topology]
    return [
        *(sys.executable, "-m", "spvit_jax.preflight", "--ways=1"),
        f"--config=configs/{recipe}",
        f"--topology={topology}",
        f"--json={output}",
        *([f"--config.data.batch_size={batch_size}"] if batch_size else []),
        *(["--config.augment.mix_group_size=128"] if batch_size else []),
    ]


def path_of(recipe: str, topology: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns the JSON file of one recipe on one topology."""
    name = f"{recipe.replace('.py', '')}-{topology}"
    return folder / f"{name.replace(':', '-').replace(',', '-')}.json"


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns a record; None without one, or if it is of an older form."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record.get("format") == report.FORMAT else None


def row(recipe: str, topology: str, record: dict[str, Any]) -> str:
    """Returns the table's line for one recipe on one topology, from its JSON file."""
    model, size = RECIPES[recipe]
    first = f"| {model} | {size} | {topology} |"
    if record["fits"]:
        return line(first, record["account"], "")
    needed = f"{record['needed_bytes'] / GIB:.1f}, too much"
    if not record["ways"]:
        return f"{first} {TOPOLOGIES[topology] or ''} | {needed}" + " |" * 11
    way = record["ways"][0]
    changes = ", ".join(f"`{name}={value}`" for name, value in way["changes"].items())
    return line(first, way["account"], f"{needed}; with {changes} ")


def line(first: str, compiled: dict[str, Any], remark: str) -> str:
    """Returns a line of the table: its first cells, and those of the compiled steps."""
    step, expected, at_best = compiled["train_step"], compiled["expected"], compiled["at_best"]
    clock = step["clock"]
    largest = [
        f"{part} {100 * seconds / clock['seconds']:.0f}%"
        for part, seconds in list(clock["seconds_by_part"].items())[:3]
    ]
    seconds = step["compile_seconds"] + compiled["eval_step"]["compile_seconds"]
    cells = [
        str(compiled["batch_size"]),
        f"{remark}{compiled['needed_bytes'] / GIB:.2f} of {compiled['usable_bytes'] / GIB:.2f}",
        f"{1000 * expected['step_seconds']:.0f}",
        f"{1000 * at_best['step_seconds']:.0f} ({at_best['by']})",
        f"{expected['images_per_second']:,.0f}",
        f"{at_best['images_per_second']:,.0f}",
        f"{100 * expected['mfu']:.0f}%",
        f"{100 * at_best['mfu']:.0f}%",
        f"{expected['hours']:.1f}",
        f"{expected['chip_hours']:.0f}",
        ", ".join(largest),
        f"{seconds / 60:.0f} min",
    ]
    return f"{first} {' | '.join(cells)} |"


def table(folder: pathlib.Path) -> str:
    """Returns the JSON files of a folder as a Markdown table, with a list of the missing ones."""
    head = (
        *("model", "pixels", "topology", "batch", "memory, GiB"),
        *("step expected, ms", "at best", "images/s expected", "at best"),
        *("MFU expected", "at best", "hours expected", "chip-hours"),
        *("most of it is", "compiled in"),
    )
    lines, missing = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for recipe, topology in PAIRS:
        record = read(path_of(recipe, topology, folder))
        if record is None:
            missing.append(f"{recipe} on {topology}")
        else:
            lines.append(row(recipe, topology, record))
    if missing:
        lines += ["", f"Not recorded yet: {'; '.join(missing)}."]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.preflight`: makes missing files, and the table after each."""
    del argv
    folder, target = pathlib.Path(flags.FLAGS.output), pathlib.Path(flags.FLAGS.table)
    folder.mkdir(parents=True, exist_ok=True)
    markdown.replace_between(MARKS, table(folder), target)
    if flags.FLAGS.table_only:
        return
    for recipe, topology in PAIRS:
        path = path_of(recipe, topology, folder)
        if read(path) is not None:
            continue
        partial = path.with_suffix(".partial")
        arguments = command(recipe, topology, partial)
        print(" ".join(arguments[1:]), flush=True)
        try:
            code = subprocess.run(arguments, check=False).returncode
        except KeyboardInterrupt:
            sys.exit("stopped; start it again to continue")
        print(f"exit code {code}", flush=True)
        if partial.exists():
            partial.replace(path)
        markdown.replace_between(MARKS, table(folder), target)


if __name__ == "__main__":
    flags.DEFINE_string("output", "docs/preflight", "Folder of the records.")
    flags.DEFINE_string("table", "docs/preflight.md", "File with the marks of the table.")
    flags.DEFINE_bool("table_only", False, "Write the table of what is recorded, and end.")
    app.run(main)
