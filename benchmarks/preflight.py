"""Preflights the recipes of SP-ViT and MaiT on several TPU topologies, and tabulates them.

    python -m benchmarks.preflight

Runs the command that a user types, once for each recipe and topology, and keeps its JSON file. A
recipe and topology with a file is not compiled again, so that this can be stopped and continued.
The table goes between the two marks in a Markdown file, with a row for each JSON file.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

# Config files, each with its model and pixels in the table.
RECIPES = {
    "spvit.py:s": ("SP-ViT-S", 224),
    "mait.py:s": ("MaiT-S", 224),
    "spvit.py:s,384": ("SP-ViT-S", 384),
    "spvit.py:m": ("SP-ViT-M", 224),
    "spvit.py:m,384": ("SP-ViT-M", 384),
    "spvit.py:l": ("SP-ViT-L", 224),
    "spvit.py:l,384": ("SP-ViT-L", 384),
}
# Topologies, each with the batch size where it is not the recipe's.
TOPOLOGIES = {"v5e:4x4": None, "v5p:2x2x2": None, "v6e:4x4": None, "v5e:16x16": 4096}
MARKS = "<!-- table -->", "<!-- end of the table -->"
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


def row(recipe: str, topology: str, record: dict[str, Any]) -> str:
    """Returns the table's line for one recipe on one topology, from its JSON file."""
    model, size = RECIPES[recipe]
    first = f"| {model} | {size} | {topology} |"
    if not record["fits"]:
        needed = f"{record['needed_bytes'] / GIB:.1f}"
        if not record["ways"]:
            return f"{first} {TOPOLOGIES[topology] or ''} | {needed}, too much | | | | | | | | |"
        way = record["ways"][0]
        changes = ", ".join(f"`{name}={value}`" for name, value in way["changes"].items())
        return line(first, way["account"], f"{needed}, too much; with {changes} ")
    return line(first, record["account"], "")


def line(first: str, compiled: dict[str, Any], remark: str) -> str:
    """Returns a line of the table: its first cells, and those of the compiled steps."""
    step, bound = compiled["train_step"], compiled["bound_seconds"]
    memory = step["memory_bytes"]
    state = sum(
        memory.get(kind, 0) for kind in ("parameters", "optimizer", "moving average", "other state")
    )
    seconds = step["compile_seconds"] + compiled["eval_step"]["compile_seconds"]
    cells = [
        str(compiled["batch_size"]),
        f"{remark}{compiled['needed_bytes'] / GIB:.2f} of {compiled['usable_bytes'] / GIB:.2f}",
        f"{state / GIB:.2f}",
        f"{memory['activations'] / GIB:.2f}",
        f"{memory['temporaries'] / GIB:.2f}",
        f"{1000 * bound['step']:.0f} ({bound['by']})",
        f"{compiled['images_per_second_at_bound']:,.0f}",
        f"{100 * compiled['mfu_at_bound']:.0f}%",
        f"{compiled['hours_at_bound']:.1f}",
        f"{compiled['chip_hours_at_bound']:.0f}",
        f"{seconds / 60:.0f} min",
    ]
    return f"{first} {' | '.join(cells)} |"


def table(folder: pathlib.Path) -> str:
    """Returns the JSON files of a folder as a Markdown table, with a list of the missing ones."""
    head = (
        *("model", "pixels", "topology", "batch"),
        *("memory, GiB", "state", "activations", "temporaries"),
        *("step at best, ms", "images/s", "MFU", "hours", "chip-hours", "compiled in"),
    )
    lines, missing = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for recipe in RECIPES:
        for topology in TOPOLOGIES:
            path = path_of(recipe, topology, folder)
            if path.exists():
                lines.append(row(recipe, topology, json.loads(path.read_text())))
            else:
                missing.append(f"{recipe} on {topology}")
    if missing:
        lines += ["", f"Not recorded yet: {'; '.join(missing)}."]
    return "\n".join(lines)


def write(text: str, path: pathlib.Path) -> None:
    """Writes a table between the marks in a Markdown file."""
    before, _, rest = path.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.preflight`: makes missing files, and the table after each."""
    del argv
    folder, target = pathlib.Path(flags.FLAGS.output), pathlib.Path(flags.FLAGS.table)
    folder.mkdir(parents=True, exist_ok=True)
    write(table(folder), target)
    if flags.FLAGS.table_only:
        return
    # The topologies that people have first.
    for topology in TOPOLOGIES:
        for recipe in RECIPES:
            path = path_of(recipe, topology, folder)
            if path.exists():
                continue
            partial = path.with_suffix(".partial")
            arguments = command(recipe, topology, partial)
            print(" ".join(arguments[1:]), flush=True)
            code = subprocess.run(arguments, check=False).returncode
            print(f"exit code {code}", flush=True)
            if partial.exists():
                partial.rename(path)
            write(table(folder), target)


if __name__ == "__main__":
    flags.DEFINE_string("output", "docs/preflight", "Folder of the records.")
    flags.DEFINE_string("table", "docs/preflight.md", "File with the marks of the table.")
    flags.DEFINE_bool("table_only", False, "Write the table of what is recorded, and end.")
    app.run(main)
