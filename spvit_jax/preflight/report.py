"""Reports of compiled runs and trials, as text to read and as dictionaries for JSON."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from spvit_jax.models.naming import named_leaves
from spvit_jax.preflight.clock import CALIBRATION, CYCLES, Clock
from spvit_jax.preflight.compile import CompiledStep
from spvit_jax.preflight.roofline import CompiledRun, Speed
from spvit_jax.preflight.search import Trial, as_flags
from spvit_jax.preflight.topology import GIB, Topology
from spvit_jax.training import sharding
from spvit_jax.training.run import TrainingRun

FORMAT = 2  # of the records; the first had no expected times
_LONGEST = 20  # instructions of a step in a record


def describe(run: TrainingRun, topology: Topology) -> str:
    """Returns a summary of a run before it is compiled: topology, model, steps, state."""
    config, mesh = run.config, run.mesh.shape
    size = "×".join(map(str, run.model.image_shape))
    remat = ", blocks recomputed" if run.model.remat else ""
    parts = config.optim.accumulate
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    hosts = "1 host" if topology.hosts == 1 else f"{topology.hosts} hosts"
    return (
        f"topology        {topology.name}, {topology.chips} chips with {hosts}; mesh data "
        f"{mesh['data']} × fsdp {mesh['fsdp']}\n"
        f"model           {config.model.name} at {size} pixels in {run.model.dtype}{remat}\n"
        f"steps           {run.steps:,} of {config.data.batch_size:,} images{micro}\n"
        f"state           {sharding.describe(run.abstract, run.mesh)}"
    )


def as_text(compiled: CompiledRun) -> str:
    """Returns memory, cost and time of a compiled run as lines of text."""
    train, evaluation, chip = compiled.train, compiled.evaluation, compiled.chip
    lines = [
        f"compiled        train step {train.seconds:.0f} s, eval step {evaluation.seconds:.0f} s",
        "",
        "memory of a chip, GiB",
    ]
    lines += [f"  {kind:<28}{size / GIB:9.3f}" for kind, size in train.memory.items()]
    lines += [
        f"  {'train step':<28}{train.total / GIB:9.3f}",
        f"  {'eval step, state beside it':<28}{(evaluation.total + compiled.resident) / GIB:9.3f}",
        f"  {'usable':<28}{chip.usable_hbm / GIB:9.3f}  of {chip.hbm / GIB:g}",
        "",
        "a step of training, per chip",
        f"  {'operations':<28}{train.flops / 1e12:9.3f} TFLOP",
        f"  {'memory traffic':<28}{train.hbm_bytes / 1e9:9.3f} GB",
    ]
    lines += [
        f"  {f'{collective.kind} over {collective.axis}':<28}{collective.sent / 1e9:9.3f} GB sent, "
        f"{collective.count} {'time' if collective.count == 1 else 'times'}"
        for collective in train.collectives
    ]
    if train.unknown_loops:
        lines.append(f"  {train.unknown_loops} loops of unknown length count as if they ran once")
    return "\n".join([*lines, "", *_clock_lines(train.clock), "", *_speed_lines(compiled)])


def _clock_lines(clock: Clock) -> list[str]:
    """Returns the parts of a step by their expected time, and warnings of what is large."""
    lines = ["where its time is expected to go, ms"]
    lines += [
        f"  {part:<28}{1000 * seconds:9.3f}  {100 * seconds / clock.seconds:4.1f} %"
        for part, seconds in clock.by_part.items()
    ]
    lines.append(f"  {'one after the other':<28}{1000 * clock.seconds:9.3f}")
    lines += [
        f"  of it from {basis:<17}{1000 * seconds:9.3f}  an estimate"
        for basis, seconds in clock.by_basis.items()
        if basis != CYCLES and seconds > 0.001 * clock.seconds
    ]
    for one in clock.large:
        share = 100 * one.seconds / clock.seconds
        where = one.place or "no line of Python"
        lines.append(
            f"  warning: {one.name} takes {share:.0f}% of the step, and is no product: {one.part}, "
            f"{where}"
        )
    return lines


def _speed_lines(compiled: CompiledRun) -> list[str]:
    """Returns the expected speed of a run beside the best that its chips allow."""
    expected, at_best, limits = compiled.expected, compiled.at_best, compiled.roofline
    each = ", ".join(f"{name} {1000 * s:.3f}" for name, s in limits._asdict().items() if s)
    rows = {
        "step, ms": (1000 * expected.step, 1000 * at_best.step, ".3f"),
        "images per second": (expected.images_per_second, at_best.images_per_second, ",.0f"),
        "model FLOPs utilisation, %": (100 * expected.mfu, 100 * at_best.mfu, ".1f"),
        "the whole recipe, hours": (expected.hours, at_best.hours, ".2f"),
        "chip-hours": (expected.chip_hours, at_best.chip_hours, ".1f"),
    }
    return [
        f"{'':<30}{'expected':>9}{'at best':>12}",
        *(
            f"  {name:<28}{one:9{form}}{other:12{form}}"
            for name, (one, other, form) in rows.items()
        ),
        f"  at best by {limits.by} ({each})",
        f"  {CALIBRATION}",
    ]


def verdict(topology: Topology, needed: float) -> str:
    """Returns in one line whether a run fits in the memory of a topology's chips.

    Args:
      topology: the chips.
      needed: HBM bytes per chip that the run needs.
    """
    usable = topology.chip.usable_hbm
    return (
        f"{'fits' if needed <= usable else 'does not fit'}: a chip of {topology.name} needs "
        f"{needed / GIB:.2f} GiB of the {usable / GIB:.2f} that a program can use"
    )


def as_dict(compiled: CompiledRun) -> dict[str, Any]:
    """Returns the numbers of a compiled run for JSON: bytes, FLOPs, seconds and rates.

    Those of the steps are per chip, images per second and chip-hours of all chips.
    """
    run, limits = compiled.run, compiled.roofline
    expected, at_best = compiled.expected, compiled.at_best
    return {
        "libtpu": importlib.metadata.version("libtpu"),
        "topology": compiled.topology.name,
        "chips": compiled.topology.chips,
        "hosts": compiled.topology.hosts,
        "mesh": dict(run.mesh.shape),
        "model": run.config.model.name,
        "image_size": list(run.model.image_shape),
        "dtype": run.model.dtype,
        "remat": run.model.remat,
        "accumulate": run.config.optim.accumulate,
        "batch_size": run.config.data.batch_size,
        "steps": run.steps,
        "fits": compiled.fits,
        "needed_bytes": compiled.needed,
        "usable_bytes": compiled.chip.usable_hbm,
        "train_step": _step(compiled.train),
        "eval_step": _step(compiled.evaluation),
        "state_beside_eval_step_bytes": compiled.resident,
        "expected": _speed(expected),
        "at_best": {**_speed(at_best), "limits_seconds": limits._asdict(), "by": limits.by},
        "calibration": CALIBRATION,
    }


def _speed(speed: Speed) -> dict[str, float]:
    return {
        "step_seconds": speed.step,
        "eval_step_seconds": speed.eval_step,
        "images_per_second": speed.images_per_second,
        "mfu": speed.mfu,
        "hours": speed.hours,
        "chip_hours": speed.chip_hours,
    }


def _step(step: CompiledStep) -> dict[str, Any]:
    return {
        "memory_bytes": step.memory,
        "total_bytes": step.total,
        "flops": step.flops,
        "hbm_bytes": step.hbm_bytes,
        "collectives": [
            {
                "kind": collective.kind,
                "axis": collective.axis,
                "count": collective.count,
                "sent_bytes": collective.sent,
            }
            for collective in step.collectives
        ],
        "clock": {
            "seconds": step.clock.seconds,
            "seconds_by_part": step.clock.by_part,
            "seconds_by_basis": step.clock.by_basis,
            "large": [one.name for one in step.clock.large],
            "longest": [vars(one) for one in step.clock.instructions[:_LONGEST]],
        },
        "loops_of_unknown_length": step.unknown_loops,
        "compiler": step.compiler,
        "compile_seconds": step.seconds,
    }


def trial_text(trial: Trial) -> str:
    """Returns a trial as one line of text."""
    if trial.compiled is None or not trial.fits:
        return f"  {as_flags(trial.changes):<58} {trial.reason}"
    compiled = trial.compiled
    return (
        f"  {as_flags(trial.changes):<58} {compiled.needed / GIB:6.2f} GiB, expected "
        f"{compiled.expected.images_per_second:,.0f} images/s, {compiled.expected.hours:.2f} hours"
    )


def trial_dict(trial: Trial) -> dict[str, Any]:
    """Returns the numbers of a trial for JSON."""
    compiled = None if trial.compiled is None else as_dict(trial.compiled)
    return {
        "changes": trial.changes,
        "fits": trial.fits,
        "needed_bytes": trial.needed,
        "reason": trial.reason,
        "account": compiled,
    }


def table(trials: list[Trial]) -> str:
    """Returns the trials of a sweep as a Markdown table."""
    head = (
        "batch",
        "remat",
        "fsdp",
        "memory, GiB",
        "images/s",
        "at best",
        "by",
        "MFU",
        "hours",
        "compiled in",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for trial in trials:
        first = " | ".join(
            str(trial.changes[name]) for name in ("data.batch_size", "model.remat", "mesh.fsdp")
        )
        if trial.compiled is None:
            lines.append(f"| {first} | {trial.reason} | – | – | – | – | – | – |")
            continue
        compiled = trial.compiled
        expected, at_best = compiled.expected, compiled.at_best
        seconds = compiled.train.seconds + compiled.evaluation.seconds
        memory = f"{compiled.needed / GIB:.2f}" + ("" if compiled.fits else ", too much")
        lines.append(
            f"| {first} | {memory} | {expected.images_per_second:,.0f} | "
            f"{at_best.images_per_second:,.0f} | {compiled.roofline.by} | "
            f"{100 * expected.mfu:.0f}% | {expected.hours:.2f} | {seconds:.0f} s |"
        )
    return "\n".join(lines)


def shardings(run: TrainingRun) -> str:
    """Returns lines with each parameter's name, shape, `PartitionSpec` and shape on a chip."""
    lines = ["parameters: shape, placement, a chip's part"]
    for name, leaf in named_leaves(run.abstract.model.params).items():
        part = "×".join(map(str, leaf.sharding.shard_shape(leaf.shape)))
        whole = "×".join(map(str, leaf.shape))
        lines.append(f"  {name:<44} {whole:<18} {leaf.sharding.spec!s:<34} {part}")
    return "\n".join(lines)
