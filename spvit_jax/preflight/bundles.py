"""Cycles of kernels by the instruction bundles that they were compiled to.

A chip starts one bundle (VLIW instruction) per cycle, so bundles times the rounds of their loops
are the cycles of a kernel that never waits. libtpu writes the bundles of a program to files; the
text of one is a line per bundle, in loops marked `LB` and as many `>` as loops around it.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?:\s([> ]*)\{(.*)$")
_IF = r"(?:\(!?%p\w+\), )?"  # condition of an instruction
_EXIT = re.compile(rf"(%p\w+) = scmp\.ge\.s32\.totalorder {_IF}(%s\w+), (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(!(%p\w+)\) target = (\$region\d+)")
_COUNTER = re.compile(rf"(%s\w+) = sadd\.s32 {_IF}(\d+), (%s\w+)")
_PHI = re.compile(r"(%s\w+) = sphi (%s\w+),")
_START = re.compile(r"(%s\w+) = smov (\d+)")


def libtpu_options(folder: pathlib.Path) -> str:
    """Returns the options, for `LIBTPU_INIT_ARGS`, with which libtpu writes bundles to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=^final_bundles$"
    )


def read_folder(folder: pathlib.Path, names: Iterable[str]) -> dict[str, int]:
    """Returns the cycles of kernels by their bundles; those that cannot be read are left out.

    Args:
      folder: folder that libtpu wrote to.
      names: names of the kernels' instructions in the compiled program.
    """
    names, cycles = set(names), {}
    for path in folder.glob("*-final_bundles.txt"):
        found = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if found and found[1] in names and (count := count_cycles(path.read_text())):
            cycles[found[1]] = count
    return cycles


def count_cycles(text: str) -> int | None:
    """Returns the cycles of a kernel without waiting: its bundles, each as often as its loops run.

    Every branch counts as taken. In the loop over the grid, stages before the first and after the
    last program of it, which only move data, count as nothing.

    Args:
      text: the bundles as libtpu writes them.

    Returns:
      The number of cycles; None if the rounds of a loop cannot be read.
    """
    regions, parents, bundles = [""], [0], [0]  # of each loop, the program itself first
    innermost = [0]  # by depth, the loop that began last
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        depth = bundle[2].count(">")
        if bundle[1] == "LB":
            region = re.search(r"Start region (\d+)", bundle[3])
            regions.append(f"$region{region[1]}" if region else "")
            parents.append(innermost[depth - 1])
            bundles.append(0)
            innermost[depth:] = [len(regions) - 1]
        if depth >= len(innermost):
            return None
        bundles[innermost[depth]] += 1
    rounds = [1]
    for label, parent in zip(regions[1:], parents[1:], strict=True):
        own = _programs(text, label) if parent == 0 else None
        own = own or _rounds(text, label)
        if own is None:
            return None
        rounds.append(own * rounds[parent])
    return sum(count * times for count, times in zip(bundles, rounds, strict=True))


def _programs(text: str, region: str) -> int | None:
    """Returns the number of programs if the loop that starts at a region is that over the grid."""
    grid = re.search(r"^\s*iteration_bounds: \(([\d, ]+)\)", text, re.MULTILINE)
    if grid is None or (exit_test := _exit_test(text, region)) is None:
        return None
    programs = math.prod(int(side) for side in re.findall(r"\d+", grid[1]))
    return programs if exit_test[1] == programs + 2 else None  # a pipeline fills and drains


def _exit_test(text: str, region: str) -> tuple[str, int] | None:
    """Returns the counter of a loop that starts at a region, and the value at which it ends."""
    exits = {pred: (counter, int(end)) for pred, counter, end in _EXIT.findall(text)}
    tests = [exits.get(pred) for pred, target in _BRANCH.findall(text) if target == region]
    return tests[0] if region and len(tests) == 1 else None


def _rounds(text: str, region: str) -> int | None:
    """Returns how often a loop runs that starts at a region; None if that cannot be read."""
    if (exit_test := _exit_test(text, region)) is None:
        return None
    counter, end = exit_test
    steps = {name: (int(step), before) for name, step, before in _COUNTER.findall(text)}
    starts = {name: int(value) for name, value in _START.findall(text)}
    if counter not in steps:
        return None
    step, before = steps[counter]
    start = starts.get(dict(_PHI.findall(text)).get(before, ""))
    if start is None or not step:
        return None
    return math.ceil((end - start) / step)
