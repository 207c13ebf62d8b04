"""Search for changes with which a run fits in memory: likely cheap ones first, each compiled."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from spvit_jax.errors import InputError
from spvit_jax.models.naming import named_leaves
from spvit_jax.preflight import child
from spvit_jax.preflight.compile import EVAL_STEP, TRAIN_STEP, CompilerError, DoesNotFitError
from spvit_jax.preflight.roofline import CompiledRun
from spvit_jax.preflight.topology import GIB, Chip, Topology
from spvit_jax.training import sharding
from spvit_jax.training.run import TrainingRun

Changes = dict[str, Any]  # values of configuration fields, by names such as "model.remat"
Replan = Callable[..., TrainingRun]  # of changes and `devices`; can be pickled
_MAX_TRIALS = 9
# Fraction of temporaries that remains with remat; an estimate, for the order alone.
_REMAT_FRACTION = 0.4


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration with some changes, and the result of compiling it.

    Attributes:
      changes: configuration fields that differ from the given configuration.
      compiled: the run with its compiled steps; None where there was an error.
      needed: HBM bytes per chip; None where the configuration is no valid run, or the compiler
        failed.
      reason: reason why the configuration cannot be run; empty if it can.
      too_large: step that does not fit in memory, if there is one.
    """

    changes: Changes
    compiled: CompiledRun | None
    needed: float | None
    reason: str = ""
    too_large: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the configuration is a valid run and both steps fit in memory."""
        return self.needed is not None and self.too_large is None


def compile_trial(
    replan: Replan, topology: Topology, changes: Changes, *, bundles: bool = False
) -> Trial:
    """Compiles a run with some changes; the trial says so where that fails.

    Args:
      replan: function from changes, and `devices`, to the run with them.
      topology: chips to compile for.
      changes: configuration fields to change.
      bundles: whether to time kernels by their instruction bundles, as `child.compile_steps`.
    """
    try:
        run = replan(changes, devices=topology.devices)
        steps = child.compile_steps(functools.partial(replan, changes), topology, bundles=bundles)
    except DoesNotFitError as error:
        return Trial(changes, None, error.needed, str(error), error.step)
    except (InputError, CompilerError) as error:
        return Trial(changes, None, None, str(error))
    compiled = CompiledRun(run, topology, *steps)
    reason = (
        "" if compiled.fits else f"the {compiled.too_large} needs {compiled.needed / GIB:.2f} GiB"
    )
    return Trial(changes, compiled, compiled.needed, reason, compiled.too_large)


def search(
    run: TrainingRun,
    topology: Topology,
    replan: Replan,
    failed: Trial,
    *,
    ways: int,
    report: Callable[[Trial], None],
) -> list[Trial]:
    """Finds ways to make a run fit, the fastest first.

    Where the eval step does not fit, smaller eval batches are tried.

    Args:
      run: run that does not fit.
      topology: chips that the run does not fit in.
      replan: function from changes of the configuration, and `devices`, to the run with them.
      failed: trial of the run without changes.
      ways: number of ways to look for.
      report: function that is called with each trial.

    Returns:
      At most `ways` trials that fit, each compiled; there may be none.
    """
    options: Iterator[Changes] = iter(())
    if failed.needed is not None and failed.too_large == TRAIN_STEP:
        options = candidates(run, topology.chip, failed.needed)
    found: list[Trial] = []
    trial, changes, evaluation = failed, Changes(), Changes()
    for _ in range(_MAX_TRIALS):
        smaller = _smaller_evaluation(run, topology.chip, trial)
        if smaller is not None:
            evaluation = {"data.eval_batch_size": smaller}
        elif (option := next(options, None)) is not None:
            changes = option
        else:
            break
        trial = compile_trial(replan, topology, changes | evaluation)
        report(trial)
        if trial.fits:
            found.append(trial)
        if len(found) == ways:
            break
    return sorted(found, key=lambda trial: trial.compiled.expected.step if trial.compiled else 0)


def candidates(run: TrainingRun, chip: Chip, needed: float) -> Iterator[Changes]:
    """Yields changes with which a run may fit in memory, those that cost little first.

    Recomputing blocks costs a third more operations; splitting parameters costs communication;
    micro-batches cost nothing but small matrices, and where parameters are split communicate for
    each. Several changes at once come last. Those whose estimate is above a chip's memory
    are left out.

    Args:
      run: run that does not fit.
      chip: peak figures of its chips.
      needed: HBM bytes per chip that the run needs.
    """
    usable = chip.usable_hbm
    chips, parts = run.mesh.size, run.config.optim.accumulate
    fsdp, is_split = run.config.mesh.fsdp, run.config.mesh.sharding == "fsdp"
    state = _state_bytes(run)
    rest = max(needed - state, 0)
    accumulations = [
        count
        for count in range(parts + 1, run.config.data.batch_size // chips + 1)
        if run.config.data.batch_size % (chips * count) == 0
    ]
    splits = [count for count in range(fsdp + 1, chips + 1) if chips % count == 0]
    remats = [False] if run.model.remat else [False, True]
    estimates = []
    for remat, count, split in itertools.product(remats, [parts, *accumulations], [fsdp, *splits]):
        changes: Changes = {}
        if remat:
            changes["model.remat"] = True
        if count != parts:
            changes["optim.accumulate"] = count
        if split != fsdp:
            changes["mesh.fsdp"] = split
            if run.config.mesh.data != -1:
                changes["mesh.data"] = -1
            if not is_split:
                changes["mesh.sharding"] = "fsdp"
        estimate = state * fsdp / split
        estimate += rest * parts / count * (_REMAT_FRACTION if remat else 1)
        if changes and estimate <= usable:
            estimates.append(((len(_kinds(changes)), count, remat, split), changes))
    # Of each combination of fields the mildest first, then one that is stronger.
    ranked = sorted(estimates, key=lambda pair: pair[0])
    by_kind: dict[frozenset[str], list[Changes]] = {}
    for _, changes in ranked:
        by_kind.setdefault(_kinds(changes), []).append(changes)
    for rank in range(2):
        for options in by_kind.values():
            if len(options) > rank:
                yield options[rank]


def _smaller_evaluation(run: TrainingRun, chip: Chip, trial: Trial) -> int | None:
    """Returns the largest eval batch size that may fit, if that of a trial does not."""
    if trial.too_large != EVAL_STEP or trial.needed is None:
        return None
    fsdp = run.config.mesh.fsdp
    state = _state_bytes(run) * fsdp / trial.changes.get("mesh.fsdp", fsdp)
    tried = size = trial.changes.get("data.eval_batch_size", run.eval_batch_size)
    while size > run.mesh.size:
        size = sharding.round_up(size // 2, run.mesh)
        if state + (trial.needed - state) * size / tried <= chip.usable_hbm:
            return size
    return None


def _state_bytes(run: TrainingRun) -> int:
    """Returns the bytes per chip of a run's train state."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in named_leaves(run.abstract).values()
    )


def _kinds(changes: Changes) -> frozenset[str]:
    return frozenset(changes) - {"mesh.sharding", "mesh.data"}


def as_flags(changes: Changes) -> str:
    """Returns changes as flags of the command line."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items()) or "as it is"
