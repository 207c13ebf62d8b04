"""Compiles a run for TPUs that are not there: does it fit, what does it cost, can it start?

    pip install -r requirements-tpu.txt
    python -m spvit_jax.preflight --config=configs/spvit.py:l,384 --topology=v5e:16x16 \
        --config.data.batch_size=4096 --json=preflight.json

The train step and the eval step are those of `train.py`, with its shardings and its donation,
compiled by the TPU's own compiler on any Linux machine with an x86 CPU; it takes minutes.

Exit code 0: the run fits and nothing is wrong; 1: it does not, and what would fit has been said;
2: wrong input. Data that is not on this machine is no mistake where its size is known.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from spvit_jax import cli, readiness
from spvit_jax.errors import InputError
from spvit_jax.models import ModelConfig
from spvit_jax.plan import check_names
from spvit_jax.readiness import Check
from spvit_jax.tpu import chips, environment, present, remedies
from spvit_jax.tpu.account import DataFacts, Run, plan
from spvit_jax.tpu.remedies import Trial


def preflight(
    config: ConfigDict,
    topology_name: str,
    num_slices: int = 1,
    *,
    workdir: pathlib.Path | None = None,
    ways: int = 3,
    show_shardings: bool = False,
) -> tuple[bool, dict[str, Any]]:
    """Checks a launch and compiles it; prints as it goes.

    Args:
      config: as `spvit_jax.config.base`.
      topology_name: such as `v5e:16x16`.
      num_slices: how many of them.
      workdir: of the run, to be looked at; None for not at all.
      ways: how many to look for to make it fit, where it does not.
      show_shardings: whether to print how each parameter is split.

    Returns:
      Whether the run can be launched, and the account as JSON can hold it.

    Raises:
      InputError: libtpu is missing, or the configuration or the topology cannot be used.
    """
    run, data, teacher, checks = _plan(config, topology_name, num_slices, workdir)
    print(present.describe(run))
    for check in checks:
        print(f"{check.what:<16}{check.state}: {check.words}")
    if show_shardings:
        print(present.shardings(run))
    print("compiling       the train step and the eval step; a deep model takes long", flush=True)

    trial = remedies.attempt(config, run.topology, data, {}, teacher=teacher)
    if trial.needed is None:
        raise InputError(trial.reason)
    if trial.account is not None:
        print(present.as_text(trial.account))
    print(present.verdict(run, trial.needed), flush=True)
    found: list[Trial] = []
    tried: list[Trial] = []
    if not trial.fits and ways:
        print("compiling what may make it fit:", flush=True)
        found = remedies.find(run, config, trial, ways=ways, report=lambda one: _report(one, tried))
        _advise(run, found)
    result = {
        **present.trial_dict(trial),
        "checks": [vars(check) for check in checks],
        "ways": [present.trial_dict(way) for way in found],
        "tried": [present.trial_dict(one) for one in tried],
    }
    return trial.fits and all(check.state != readiness.WRONG for check in checks), result


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
      config: as `spvit_jax.config.base`.
      topology_name: such as `v5e:16x16`.
      num_slices: how many of them.
      batch_sizes: images per step; empty for the configuration's, half and twice of it.
      remats: whether blocks are recomputed; empty for both.
      fsdps: sizes of the axis; empty for 1, and all chips.

    Returns:
      The trials as JSON can hold them.
    """
    run, data, teacher, _ = _plan(config, topology_name, num_slices, None)
    print(present.describe(run), flush=True)
    batch = config.data.batch_size
    trials: list[Trial] = []
    for batch_size, remat, fsdp in itertools.product(
        batch_sizes or [batch // 2, batch, 2 * batch],
        remats or [False, True],
        fsdps or sorted({1, run.mesh.size}),
    ):
        changes = {"data.batch_size": batch_size, "model.remat": remat, "mesh.fsdp": fsdp}
        changes |= {"mesh.data": -1}
        trial = remedies.attempt(config, run.topology, data, changes, teacher=teacher)
        _report(trial, trials)
    print(present.table(trials))
    return {"trials": [present.trial_dict(trial) for trial in trials]}


def _plan(
    config: ConfigDict, topology_name: str, num_slices: int, workdir: pathlib.Path | None
) -> tuple[Run, DataFacts, ModelConfig | None, list[Check]]:
    """Finds everything out that needs no compiler."""
    check_names(config)
    environment.prepare()
    topology = chips.topology(topology_name, num_slices)
    data, checks = readiness.check_data(config)
    teacher = readiness.check_teacher(config)
    run = plan(config, topology, data, teacher=teacher)
    return run, data, teacher, checks + readiness.check_launch(run, workdir)


def _report(trial: Trial, trials: list[Trial]) -> None:
    trials.append(trial)
    print(present.trial_text(trial), flush=True)


def _advise(run: Run, ways: list[Trial]) -> None:
    """Prints what fits, the fastest first, with what else it changes."""
    if not ways:
        print(f"nothing that was tried fits {run.topology.name}; take more or larger chips")
        return
    print("it fits with one of these, the fastest first:")
    for way in ways:
        print(present.trial_text(way))
    if any("optim.accumulate" in way.changes for way in ways) and run.has_batch_norm:
        print("  (in micro-batches, BatchNorm normalises over each of them alone)")


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag()
    topology = flags.DEFINE_string(
        "topology", None, "Chips, such as v5e:16x16 or v5p:2x2x2.", required=True
    )
    num_slices = flags.DEFINE_integer("num_slices", 1, "How many of them, as one cluster.", 1)
    workdir = flags.DEFINE_string("workdir", None, "Of the run: whether it can be written to.")
    json_path = flags.DEFINE_string("json", None, "File for all numbers.")
    ways = flags.DEFINE_integer("ways", 3, "Ways to look for where a run does not fit.", 0)
    shardings = flags.DEFINE_bool("shardings", False, "Print how each parameter is split.")
    sweeping = flags.DEFINE_bool("sweep", False, "Try batch sizes, remat and meshes, as a table.")
    batch_sizes = flags.DEFINE_list("sweep_batch_size", [], "Batch sizes; else ½, 1 and 2 times.")
    remats = flags.DEFINE_list("sweep_remat", [], "true, false or both; else both.")
    fsdps = flags.DEFINE_list("sweep_fsdp", [], "Sizes of the fsdp axis; else 1 and all chips.")

    def command() -> None:
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
                workdir=pathlib.Path(workdir.value) if workdir.value else None,
                ways=ways.value,
                show_shardings=shardings.value,
            )
        if json_path.value:
            _write(pathlib.Path(json_path.value), result)
        if not ready:
            cli.fail("not ready to launch; see above", code=1)

    cli.run(command)


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
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
