"""Reports of compiled runs and trials, as text to read and as dictionaries for JSON."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from spvit_jax.models.naming import named_leaves
from spvit_jax.preflight.compile import CompiledStep
from spvit_jax.preflight.roofline import CompiledRun, roofline
from spvit_jax.preflight.search import Trial, as_flags
from spvit_jax.preflight.topology import GIB, Topology
from spvit_jax.training import sharding
from spvit_jax.training.run import TrainingRun


def describe(run: TrainingRun, topology: Topology) -> str:
    """Returns a summary of a run before it is compiled: topology, model, steps, state."""
    config, mesh = run.config, run.mesh.shape
    size = "×".join(map(str, run.model.image_shape))
    remat = ", blocks recomputed" if run.model.remat else ""
    parts = config.optim.accumulate
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    hosts = "1 host" if topology.hosts == 1 else f"{topology.hosts} hosts"
    return (
        f"topology        {topology.name}, {run.mesh.size} chips with {hosts}; mesh data "
        f"{mesh['data']} × fsdp {mesh['fsdp']}\n"
        f"model           {config.model.name} at {size} pixels in {run.model.dtype}{remat}\n"
        f"steps           {run.steps:,} of {config.data.batch_size:,} images{micro}\n"
        f"state           {sharding.describe(run.abstract, run.mesh)}"
    )


def as_text(compiled: CompiledRun) -> str:
    """Returns the memory and cost of both steps and their roofline as lines of text."""
    run, train, chip = compiled.run, compiled.train, compiled.chip
    limits, seconds = compiled.roofline, compiled.roofline.seconds
    lines = [
        f"compiled        train step {train.seconds:.0f} s, eval step "
        f"{compiled.evaluation.seconds:.0f} s",
        "",
        "memory of a chip, GiB",
    ]
    lines += [f"  {kind:<28}{size / GIB:9.3f}" for kind, size in train.memory.items()]
    lines += [
        f"  {'train step':<28}{train.total / GIB:9.3f}",
        f"  {'eval step, state beside it':<28}"
        f"{(compiled.evaluation.total + compiled.resident) / GIB:9.3f}",
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
    each = ", ".join(f"{name} {1000 * s:.3f}" for name, s in limits._asdict().items() if s)
    lines += [
        "",
        "at best",
        f"  {'step':<28}{1000 * seconds:9.3f} ms, by {limits.by} ({each})",
        f"  {'images per second':<28}{compiled.images_per_second:9,.0f}",
        f"  {'model FLOPs utilisation':<28}{100 * compiled.mfu:9.1f} %",
        f"  {'the whole recipe':<28}{compiled.hours:9.2f} hours, "
        f"{compiled.hours * run.mesh.size:.1f} chip-hours",
    ]
    return "\n".join(lines)


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
    return {
        "libtpu": importlib.metadata.version("libtpu"),
        "topology": compiled.topology.name,
        "chips": run.mesh.size,
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
        "bound_seconds": {**limits._asdict(), "step": limits.seconds, "by": limits.by},
        "eval_bound_seconds": roofline(compiled.evaluation, compiled.chip).seconds,
        "images_per_second_at_bound": compiled.images_per_second,
        "mfu_at_bound": compiled.mfu,
        "hours_at_bound": compiled.hours,
        "chip_hours_at_bound": compiled.hours * run.mesh.size,
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
        f"  {as_flags(trial.changes):<58} {compiled.needed / GIB:6.2f} GiB, at best "
        f"{compiled.images_per_second:,.0f} images/s, {compiled.hours:.2f} hours"
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
            lines.append(f"| {first} | {trial.reason} | – | – | – | – | – |")
            continue
        compiled = trial.compiled
        seconds = compiled.train.seconds + compiled.evaluation.seconds
        memory = f"{compiled.needed / GIB:.2f}" + ("" if compiled.fits else ", too much")
        lines.append(
            f"| {first} | {memory} | {compiled.images_per_second:,.0f} | {compiled.roofline.by} | "
            f"{100 * compiled.mfu:.0f}% | {compiled.hours:.2f} | {seconds:.0f} s |"
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
