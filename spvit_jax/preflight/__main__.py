"""Checks a launch and compiles the run for TPUs that this machine does not have.

    pip install 'spvit_jax[tpu]'
    python -m spvit_jax.preflight --config=configs/spvit.py:l,384 --topology=v5e:16x16 \
        --config.data.batch_size=4096 --json=preflight.json

The train step and the eval step are those of `train.py`, with its shardings and its donation,
compiled by the TPU's own compiler on any Linux machine with an x86 CPU, in minutes. The report says
whether they fit in memory, what they cost, and whether the run can start.

Exit code 0: the run fits and every check passed; 1: a check failed, the compiler did, or the run
does not fit, and changes with which it would have been printed; 2: wrong input; 130: stopped by
Ctrl-C. Data that is not on this machine is no error where its size is known.
"""

from __future__ import annotations

import functools
import itertools
import json
import signal
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, cli, paths, plan
from spvit_jax.errors import InputError
from spvit_jax.preflight import launch_checks, libtpu, report, search
from spvit_jax.preflight.compile import CompilerError
from spvit_jax.preflight.launch_checks import Check
from spvit_jax.preflight.search import Replan, Trial
from spvit_jax.preflight.topology import Topology, get_topology
from spvit_jax.training.run import TrainingRun

_STOPPED = 128 + signal.SIGINT  # exit code, as shells have it


def preflight(
    config: ConfigDict,
    topology_name: str,
    num_slices: int = 1,
    *,
    workdir: epath.Path | None = None,
    ways: int = 3,
    show_shardings: bool = False,
    bundles: bool = False,
) -> tuple[bool, dict[str, Any]]:
    """Checks a launch, compiles its steps, and prints the report.

    Args:
      config: configuration, as `spvit_jax.config.base`.
      topology_name: name of a slice, such as `v5e:16x16`.
      num_slices: number of such slices.
      workdir: workdir of the run, to be checked; None for no check.
      ways: number of ways to look for to make the run fit, where it does not.
      show_shardings: whether to print the sharding of each parameter.
      bundles: whether to time kernels by their instruction bundles, as `child.compile_steps`.

    Returns:
      Whether the run can be launched, and the report for JSON.

    Raises:
      InputError: libtpu is missing, or the configuration or the topology cannot be used.
      CompilerError: the compiler failed or crashed, or what it made cannot be read.
    """
    topology, replan, checks = _prepare(config, topology_name, num_slices)
    run = replan({}, devices=topology.devices)
    checks += launch_checks.check_launch(run, workdir)
    print(report.describe(run, topology))
    for check in checks:
        print(f"{check.what:<16}{check.state}: {check.words}")
    if show_shardings:
        print(report.shardings(run))
    print("compiling       the train step and the eval step; a deep model takes long", flush=True)

    trial = search.compile_trial(replan, topology, {}, bundles=bundles)
    if trial.needed is None:
        raise CompilerError(trial.reason)
    if trial.compiled is not None:
        print(report.as_text(trial.compiled))
    print(report.verdict(topology, trial.needed), flush=True)
    found: list[Trial] = []
    tried: list[Trial] = []
    if not trial.fits and ways:
        print("compiling what may make it fit:", flush=True)
        found = search.search(
            run, topology, replan, trial, ways=ways, report=lambda option: _report(option, tried)
        )
        _advise(run, topology, found)
    result = {
        "format": report.FORMAT,
        **report.trial_dict(trial),
        "checks": [vars(check) for check in checks],
        "ways": [report.trial_dict(way) for way in found],
        "tried": [report.trial_dict(option) for option in tried],
    }
    return trial.fits and all(check.state != launch_checks.WRONG for check in checks), result


def sweep(
    config: ConfigDict,
    topology_name: str,
    num_slices: int = 1,
    *,
    batch_sizes: list[int],
    remats: list[bool],
    fsdps: list[int],
) -> dict[str, Any]:
    """Compiles a run with each batch size, remat and fsdp axis, and prints a table.

    Args:
      config: configuration, as `spvit_jax.config.base`.
      topology_name: name of a slice, such as `v5e:16x16`.
      num_slices: number of such slices.
      batch_sizes: images per step; empty for the configuration's, half and twice of it.
      remats: whether blocks are recomputed; empty for both.
      fsdps: sizes of the fsdp axis; empty for 1, and all chips.

    Returns:
      The trials for JSON.
    """
    topology, replan, _ = _prepare(config, topology_name, num_slices)
    run = replan({}, devices=topology.devices)
    print(report.describe(run, topology), flush=True)
    batch = config.data.batch_size
    trials: list[Trial] = []
    for batch_size, remat, fsdp in itertools.product(
        batch_sizes or [batch // 2, batch, 2 * batch],
        remats or [False, True],
        fsdps or sorted({1, len(topology.devices)}),
    ):
        changes = {"data.batch_size": batch_size, "model.remat": remat, "mesh.fsdp": fsdp}
        changes |= {"mesh.data": -1}
        trial = search.compile_trial(replan, topology, changes)
        _report(trial, trials)
    print(report.table(trials))
    return {"trials": [report.trial_dict(trial) for trial in trials]}


def _prepare(
    config: ConfigDict, topology_name: str, num_slices: int
) -> tuple[Topology, Replan, list[Check]]:
    """Returns the topology, a function that plans the run with changes, and the data's checks."""
    plan.check_names(config)
    plan.check_paths(config)
    libtpu.prepare()
    topology = get_topology(topology_name, num_slices)
    data, checks = launch_checks.check_data(config)
    teacher = plan.find_teacher(config, data)
    replan = functools.partial(
        plan.training_run,
        config,
        data,
        teacher=None if teacher is None else teacher.model,
    )
    return topology, replan, checks


def _report(trial: Trial, trials: list[Trial]) -> None:
    trials.append(trial)
    print(report.trial_text(trial), flush=True)


def _advise(run: TrainingRun, topology: Topology, ways: list[Trial]) -> None:
    """Prints the ways that fit, the fastest first, and what they change about BatchNorm."""
    if not ways:
        print(f"nothing that was tried fits {topology.name}; take more or larger chips")
        return
    print("it fits with one of these, the fastest first:")
    for way in ways:
        print(report.trial_text(way))
    if any("optim.accumulate" in way.changes for way in ways) and run.has_batch_norm:
        print("  (in micro-batches, BatchNorm normalises over each of them alone)")


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag()
    topology = flags.DEFINE_string(
        "topology", None, "Chips, such as v5e:16x16 or v5p:2x2x2.", required=True
    )
    num_slices = flags.DEFINE_integer("num_slices", 1, "Number of such slices, as one cluster.", 1)
    workdir = flags.DEFINE_string("workdir", None, "Workdir of the run, to be checked.")
    json_path = flags.DEFINE_string("json", None, "JSON file to write all numbers to.")
    ways = flags.DEFINE_integer(
        "ways", 3, "How many changes to look for with which a run fits that does not.", 0
    )
    shardings = flags.DEFINE_bool("shardings", False, "Print the sharding of each parameter.")
    bundles = flags.DEFINE_bool(
        "bundles",
        False,
        "Time kernels by the code they are compiled to; compiling takes three times as long.",
    )
    sweeping = flags.DEFINE_bool("sweep", False, "Try batch sizes, remat and meshes, as a table.")
    batch_sizes = flags.DEFINE_list("sweep_batch_size", [], "Batch sizes; else ½, 1 and 2 times.")
    remats = flags.DEFINE_list("sweep_remat", [], "true, false or both; else both.")
    fsdps = flags.DEFINE_list("sweep_fsdp", [], "Sizes of the fsdp axis; else 1 and all chips.")

    def command() -> None:
        target = paths.parse_output(json_path.value) if json_path.value else None
        if sweeping.value:
            result = sweep(
                config(),
                topology.value,
                num_slices.value,
                batch_sizes=_numbers("sweep_batch_size", batch_sizes.value),
                remats=_truths("sweep_remat", remats.value),
                fsdps=_numbers("sweep_fsdp", fsdps.value),
            )
            ready = True
        else:
            ready, result = preflight(
                config(),
                topology.value,
                num_slices.value,
                workdir=paths.parse(workdir.value) if workdir.value else None,
                ways=ways.value,
                show_shardings=shardings.value,
                bundles=bundles.value,
            )
        if target is not None:
            _write(target, result)
        if not ready:
            cli.fail("not ready to launch; see above", code=1)

    def stoppable() -> None:
        try:
            command()
        except CompilerError as error:
            cli.fail(error, code=1)
        except KeyboardInterrupt:
            cli.fail("stopped", code=_STOPPED)

    cli.run(stoppable)


def _write(path: epath.Path, result: dict[str, Any]) -> None:
    try:
        atomic.write_text(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def _numbers(flag: str, texts: list[str]) -> list[int]:
    if not all(text.isdigit() and int(text) > 0 for text in texts):
        raise InputError(f"--{flag}={','.join(texts)}: expected numbers such as 1024,2048")
    return [int(text) for text in texts]


def _truths(flag: str, texts: list[str]) -> list[bool]:
    if not all(text in ("true", "false") for text in texts):
        raise InputError(f"--{flag}={','.join(texts)}: expected true, false or both")
    return [text == "true" for text in texts]


if __name__ == "__main__":
    main()
