"""Preflights the recipes of SP-ViT and MaiT on several TPU topologies, and tabulates them.

    python -m benchmarks.preflight

Runs the very command that a user types, once for each recipe and topology, and keeps what it
writes; what has been recorded is not compiled again, so that it can be stopped and started. The
table goes between the two marks in the file, with a row for each that is done.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

# Each with the parts of its name in the table.
RECIPES = {
    "spvit.py:s": ("SP-ViT-S", 224),
    "mait.py:s": ("MaiT-S", 224),
    "spvit.py:s,384": ("SP-ViT-S", 384),
    "spvit.py:m": ("SP-ViT-M", 224),
    "spvit.py:m,384": ("SP-ViT-M", 384),
    "spvit.py:l": ("SP-ViT-L", 224),
    "spvit.py:l,384": ("SP-ViT-L", 384),
}
# Each with the batch size, where it is not the recipe's.
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
    """Returns the file of one record."""
    name = f"{recipe.replace('.py', '')}-{topology}"
    return folder / f"{name.replace(':', '-').replace(',', '-')}.json"


def row(recipe: str, topology: str, record: dict[str, Any]) -> str:
    """Returns a line of the table."""
    model, size = RECIPES[recipe]
    first = f"| {model} | {size} | {topology} |"
    account = record["account"]
    if not record["fits"]:
        needed = f"{record['needed_bytes'] / GIB:.1f}"
        if not record["ways"]:
            return f"{first} {TOPOLOGIES[topology] or ''} | {needed}, too much | | | | | | | | |"
        way = record["ways"][0]
        changes = ", ".join(f"`{name}={value}`" for name, value in way["changes"].items())
        return line(f"{first}", way["account"], f"{needed}, too much; with {changes} ")
    return line(first, account, "")


def line(first: str, account: dict[str, Any], remark: str) -> str:
    """Returns the cells of an account behind the first ones."""
    step, bound = account["train_step"], account["bound_seconds"]
    memory = step["memory_bytes"]
    state = sum(
        memory.get(kind, 0) for kind in ("parameters", "optimizer", "moving average", "other state")
    )
    seconds = step["compile_seconds"] + account["eval_step"]["compile_seconds"]
    cells = [
        str(account["batch_size"]),
        f"{remark}{account['needed_bytes'] / GIB:.2f} of {account['usable_bytes'] / GIB:.2f}",
        f"{state / GIB:.2f}",
        f"{memory['activations'] / GIB:.2f}",
        f"{memory['temporaries'] / GIB:.2f}",
        f"{1000 * bound['step']:.0f} ({bound['by']})",
        f"{account['images_per_second_at_bound']:,.0f}",
        f"{100 * account['mfu_at_bound']:.0f}%",
        f"{account['hours_at_bound']:.1f}",
        f"{account['chip_hours_at_bound']:.0f}",
        f"{seconds / 60:.0f} min",
    ]
    return f"{first} {' | '.join(cells)} |"


def table(folder: pathlib.Path) -> str:
    """Returns the rows that are recorded as a Markdown table, and says how many are missing."""
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
    """Puts a table between the marks in a file."""
    before, _, rest = path.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def main(argv: list[str]) -> None:
    """Records what is missing, one after the other, and writes the table after each."""
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
