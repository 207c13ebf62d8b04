"""Several real processes as one: the numbers of a single one, and an end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from spvit_jax import distributed
from spvit_jax.errors import InputError
from tests.helpers import REPOSITORY
from tests.helpers.commands import (
    CONFIG,
    SMALL,
    Command,
    newest_step,
    records_of,
    run,
    saved_arrays,
    truncate_checkpoint,
    wait_until,
)

STEPS = 20
# SGD is linear in the gradient: Adam's first steps make signs of the rounding of small gradients.
# One block, and BatchNorm in the stem: a process spends most of its time on tracing the step.
SETTINGS = [
    f"{CONFIG}:lvvit",
    *SMALL,
    "--config.model.depth=1",
    "--config.model.spatial_layers=0",
    "--config.optim.name=sgd",
    "--config.optim.lr=0.05",
    f"--config.schedule.total={STEPS} steps",
    "--config.schedule.warmup=2 steps",
    f"--config.eval_every={STEPS} steps",
    "--config.checkpoint.every=5 steps",
    "--config.data.threads=1",
]
POD = REPOSITORY / "launch" / "local_pod.sh"
TRAIN, MEMBER = "spvit_jax.train", "tests.helpers.cluster_member"


def pod(environment, count, *args, devices=2):
    """Starts `local_pod.sh`, whose output is that of all processes."""
    return subprocess.Popen(
        [POD, str(count), *map(str, args)],
        cwd=REPOSITORY,
        env=environment | {"DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process, code, seconds=300):
    """Waits for a process to end with a code; returns what it said."""
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, said[-4000:]
    return said


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_cluster(environment, module, *args_of_each, devices=2):
    """Starts a process for each list of arguments."""
    port = free_port()
    return [
        Command(
            environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
            module,
            *args,
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={len(args_of_each)}",
            f"--process_id={rank}",
        )
        for rank, args in enumerate(args_of_each)
    ]


def ends(processes, seconds=300):
    """Waits for the processes of a cluster; returns their exit codes and what each said."""
    return [p.wait(seconds) for p in processes], ["".join(p.said()) for p in processes]


def cluster(environment, module, *args_of_each, devices=2):
    """Runs a process for each list of arguments to its end, and returns as `ends`."""
    return ends(start_cluster(environment, module, *args_of_each, devices=devices))


def run_cluster(environment, count, module, *args, devices=2):
    """Runs the same command on several processes to its end; returns what they said."""
    codes, said = cluster(environment, module, *[args] * count, devices=devices)
    assert codes == [0] * count, said
    return "".join(said)


def train(environment, workdir, count, *more, devices=2):
    """Trains on several processes; examples.json says on what."""
    workdir.mkdir(exist_ok=True)
    args = ["train", workdir / "examples.json", *SETTINGS, f"--workdir={workdir}", *more]
    return run_cluster(environment, count, MEMBER, *args, devices=devices)


def train_alone(environment, workdir, *more):
    """The same on one process with four devices, without a cluster."""
    workdir.mkdir(exist_ok=True)
    args = ["train", workdir / "examples.json", *SETTINGS, f"--workdir={workdir}", *more]
    process = Command(environment | {"JAX_NUM_CPU_DEVICES": "4"}, MEMBER, *args)
    assert process.wait() == 0, process.said()


def examples_of(workdir):
    return json.loads((workdir / "examples.json").read_text())


def assert_same_numbers(workdir, reference):
    """To the order in which the gradients of the devices are added up."""
    ours, theirs = saved_arrays(workdir, STEPS), saved_arrays(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for section in ("model/params", "model/stats", "ema", "opt_state"):
        assert any(name.startswith(section) for name in ours)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for one, other in zip(records_of(workdir), records_of(reference), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def assert_same_bits(workdir, reference):
    ours, theirs = saved_arrays(workdir, STEPS), saved_arrays(reference, STEPS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes(), name
    records = [(path / "metrics.jsonl").read_bytes() for path in (workdir, reference)]
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    train_alone(environment, workdir)
    return workdir


@pytest.fixture(scope="module")
def two(environment, tmp_path_factory):
    """The same run by two processes with two devices each, as `local_pod.sh` starts them."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    workdir.mkdir()
    args = [sys.executable, "-m", MEMBER, "train", workdir / "examples.json"]
    process = pod(environment, 2, *args, *SETTINGS, f"--workdir={workdir}")
    (workdir / "said.txt").write_text(ended(process, 0))
    return workdir


def test_two_processes_compute_what_one_does(alone, two):
    assert len(examples_of(two)) == STEPS
    assert len({tuple(batch) for batch in examples_of(two)}) == STEPS
    assert examples_of(two) == examples_of(alone)
    assert_same_numbers(two, alone)


def test_only_the_first_process_reports(two):
    lines = (two / "said.txt").read_text().splitlines()
    for rank in range(2):
        start = rf"\[{rank}\] cluster +process {rank} of 2, code \S+, 2 of 4 devices"
        assert sum(bool(re.fullmatch(start, line)) for line in lines) == 1
    steps = [line for line in lines if f"step {STEPS}/{STEPS}  loss" in line]
    assert len(steps) == 1
    assert steps[0].startswith("[0] ")
    assert len(list(two.glob("events.out.tfevents.*"))) == 1
    assert not list(two.glob(".shared*"))


@pytest.mark.slow
def test_four_processes_compute_what_one_does(environment, alone, tmp_path):
    train(environment, tmp_path, 4, devices=1)
    assert examples_of(tmp_path) == examples_of(alone)
    assert_same_numbers(tmp_path, alone)


def interrupted(environment, workdir, sent, rank=1):
    """Sends one of two processes a signal after the first checkpoint; returns as `ends`."""
    args = ["hasty", *SETTINGS, f"--workdir={workdir}"]
    processes = start_cluster(environment, MEMBER, args, args)
    wait_until(lambda: newest_step(workdir) >= 5, processes[0])
    processes[rank].send_signal(sent)
    return ends(processes, seconds=60)


def test_sigterm_of_one_stops_all_at_one_step_and_the_run_goes_on(environment, two, tmp_path):
    codes, said = interrupted(environment, tmp_path, signal.SIGTERM)
    assert codes == [75, 75]
    stopped = newest_step(tmp_path)
    assert 5 < stopped < STEPS
    assert f"SIGTERM: saved at step {stopped} of {STEPS}" in said[0]
    said = run_cluster(environment, 2, TRAIN, *SETTINGS, f"--workdir={tmp_path}")
    assert f"start           at step {stopped} of {STEPS}" in said
    assert_same_bits(tmp_path, two)


def test_sigkill_of_one_ends_the_rest_and_one_process_goes_on(environment, alone, tmp_path):
    codes, said = interrupted(environment, tmp_path, signal.SIGKILL)
    assert codes == [75, -signal.SIGKILL]
    assert re.search(r"error: .*another process of the cluster was lost", said[0])
    assert newest_step(tmp_path) < STEPS
    # Four devices, as before, but all of one process.
    four = environment | {"JAX_NUM_CPU_DEVICES": "4"}
    run(four, "train", *SETTINGS, f"--workdir={tmp_path}")
    assert_same_numbers(tmp_path, alone)


def test_sigkill_of_the_coordinator_ends_the_rest_and_the_run_goes_on(environment, two, tmp_path):
    codes, said = interrupted(environment, tmp_path, signal.SIGKILL, rank=0)
    assert codes == [-signal.SIGKILL, 75]
    assert re.search(r"error: .*another process of the cluster was lost", said[1])
    assert newest_step(tmp_path) < STEPS
    run_cluster(environment, 2, TRAIN, *SETTINGS, f"--workdir={tmp_path}")
    assert_same_bits(tmp_path, two)


def test_an_input_that_hangs_ends_all_and_the_run_goes_on(environment, two, tmp_path):
    """Each says whose it is; the one that hangs has a heartbeat, and waits for nothing to fail."""
    args = ["hang", tmp_path / "hung", *SETTINGS, f"--workdir={tmp_path / 'run'}"]
    args += ["--config.stall_timeout=8"]
    codes, said = ends(start_cluster(environment, MEMBER, args, args), seconds=120)
    assert codes == [75, 75], said
    words = r"the run stands still: .*after 9 steps process 1 is waiting for input; the others wait"
    for text in said:
        assert re.search(rf"error: .*{words}", text), text[-4000:]
    assert re.search(r"  File .* in read_from_a_disk_that_hangs", said[1])
    assert re.search(r"  File .* in train\n", said[0])
    said = run_cluster(environment, 2, MEMBER, *args)
    assert f"start           at step 5 of {STEPS}" in said
    assert_same_bits(tmp_path / "run", two)


def test_a_checkpoint_that_cannot_be_read_is_moved_aside_once(environment, two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    truncate_checkpoint(workdir, STEPS)
    said = run_cluster(environment, 2, TRAIN, *SETTINGS, f"--workdir={workdir}")
    assert said.count(f"checkpoint {STEPS} cannot be read and was moved to") == 1
    assert f"start           at step {STEPS - 5} of {STEPS}" in said
    assert (workdir / "corrupt-checkpoints" / str(STEPS)).is_dir()
    assert_same_bits(workdir, two)


def test_evaluation_counts_each_example_once(environment, alone, tmp_path):
    """500 examples in batches of 96: the last has 20, all of them of the first process."""
    output = tmp_path / "result.json"
    args = [*SETTINGS, f"--checkpoint={alone}", "--config.data.eval_batch_size=96"]
    args += [f"--json={output}", "--split=test", f"--report={tmp_path}/report"]
    said = run_cluster(environment, 2, "spvit_jax.evaluate", *args)
    assert said.count('"top1"') == 1
    results = json.loads(output.read_text())
    expected = records_of(alone)[-1]
    assert results["count"] == expected["eval/count"] == 500
    assert results["top1"] == pytest.approx(expected["eval/top1"])
    assert results["top5"] == pytest.approx(expected["eval/top5"])
    assert results["loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["count"] == sum(map(sum, report["confusion"])) == 500
    assert report["top1"] == pytest.approx(expected["eval/top1"])


def test_several_processes_learn_from_token_labels_what_one_does(environment, alone, tmp_path):
    """Each reads the maps of its own share; groups of MixToken span both."""
    labels = tmp_path / "labels.npy"
    run(
        environment,
        "data.token_labels",
        "make",
        *SETTINGS,
        f"--checkpoint={alone}",
        f"--output={labels}",
    )
    student = [f"--config.token_labels.path={labels}", "--config.augment.mix_token=True"]
    student += ["--config.augment.mix_group_size=16"]
    train_alone(environment, tmp_path / "alone", *student)
    train(environment, tmp_path / "two", 2, *student)
    assert examples_of(tmp_path / "two") == examples_of(tmp_path / "alone")
    assert_same_numbers(tmp_path / "two", tmp_path / "alone")


def test_rows_of_a_batch_whatever_the_order_of_devices(environment, tmp_path):
    output = tmp_path / "rows.json"
    run_cluster(environment, 2, MEMBER, "rows", output)
    result = json.loads(output.read_text())
    assert len(result["held"]) == 3
    for name, rows in result["held"].items():
        assert rows == list(range(24)), name
    assert result["texts"] == [["0 0", "1 0"], ["0 1", "1 1"]]


def failing_cluster(environment, *args_of_each, module=TRAIN):
    """Trains in vain with arguments of each process; returns their exit codes and errors."""
    codes, said = cluster(environment, module, *args_of_each)
    assert not any("Traceback" in text for text in said)
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] for text in said]
    assert all(len(lines) == 1 for lines in errors), said
    return codes, [lines[0] for lines in errors]


def test_processes_that_disagree_stop_and_say_who_differs(environment, tmp_path):
    args = [*SETTINGS, f"--workdir={tmp_path / 'run'}"]
    codes, errors = failing_cluster(
        environment, args, [*args, "--config.optim.lr=0.5", "--config.data.threads=2"]
    )
    assert codes == [2, 2]
    words = "process 1 has config.optim.lr=0.5, process 0 has 0.05; start the same command"
    assert all(words in line for line in errors), errors
    assert not (tmp_path / "run").exists()


def test_folder_that_is_not_shared(environment, tmp_path):
    workdirs = [f"--workdir={tmp_path / name / 'run'}" for name in ("a", "b")]
    args = [["hasty", *SETTINGS, workdir] for workdir in workdirs]
    (tmp_path / "a" / "run").mkdir(parents=True)
    codes, errors = failing_cluster(environment, *args, module=MEMBER)
    assert codes == [2, 2]
    assert all("process 1 has another folder" in line for line in errors), errors


def test_one_that_fails_alone_takes_the_others_along(environment, tmp_path):
    """A file where process 0, which alone writes, needs a folder."""
    (tmp_path / "file").touch()
    args = [*SETTINGS, f"--workdir={tmp_path / 'file' / 'run'}"]
    codes, errors = failing_cluster(environment, args, args)
    assert codes == [2, 2]
    assert errors[0].startswith("error: cannot write to workdir")
    assert errors[1].startswith("error: process 0 has stopped: cannot write to workdir")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--process_id=1"], "process 0 has not come within 2 seconds (--cluster_timeout): "),
        (["--process_id=0"], "process 1 has not come within 2 seconds (--cluster_timeout) to"),
    ],
)
def test_cluster_that_does_not_form(flags, words, environment, tmp_path):
    where = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--cluster_timeout=2"]
    args = [*SETTINGS, f"--workdir={tmp_path / 'run'}", *where, *flags]
    start = time.monotonic()
    result = run(environment, "train", *args, check=False)
    assert time.monotonic() - start < 60
    assert result.returncode == 1, result.stderr  # a launcher may try again
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "run").exists()


def test_port_that_is_taken(environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = [f"--coordinator=127.0.0.1:{server.getsockname()[1]}", "--num_processes=2"]
        args = [*SETTINGS, f"--workdir={tmp_path}", *flags, "--process_id=0"]
        result = run(environment, "train", *args, check=False)
    assert result.returncode == 2
    assert "is taken on this machine" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("host:1", 2, None), "go together; given were host:1, 2 and None"),
        ((None, None, 0), "go together; given were None, None and 0"),
        (("host:1", 2, 2), "--process_id is 2 of --num_processes=2"),
        (("host:1", 2, -1), "--process_id is -1 of --num_processes=2"),
        *((where, "expected HOST:PORT") for where in ("host", ":1", "host:", "h:0", "h:65536")),
    ],
)
def test_place_that_cannot_be(given, words):
    given = (given, 2, 0) if isinstance(given, str) else given
    with pytest.raises(InputError, match=re.escape(words)):
        distributed.Address(*given)


def test_pods_are_known_by_their_environment():
    assert not distributed.is_pod({})
    assert not distributed.is_pod({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": ""})
    assert distributed.is_pod({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert distributed.is_pod({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"})
    assert distributed.is_pod({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"})


def test_code_version(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    short = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert distributed.code_version(tmp_path) == short.stdout.strip()
    (tmp_path / "file").write_text("2")
    assert distributed.code_version(tmp_path) == short.stdout.strip() + "-dirty"
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / "VERSION").write_text("abc1234-dirty\n")
    assert distributed.code_version(tmp_path) == "abc1234-dirty"


def test_local_pod_needs_a_number_and_a_command():
    for args in ([], ["2"], ["two", "true"], ["0", "true"]):
        result = subprocess.run([POD, *args], capture_output=True, text=True)
        assert result.returncode == 2
        assert "usage: " in result.stderr


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((0, 137), 1), ((1, 2), 2), ((75, 1), 1)]
)
def test_local_pod_returns_the_code_that_matters(codes, expected):
    """And names the processes that failed, of which those that are to start again are none."""
    script = 'codes=({} {}); id=${{!#}}; echo "said $DEVICES"; exit "${{codes[${{id#*=}}]}}"'
    process = pod(dict(os.environ), 2, "bash", "-c", script.format(*codes), "name", devices=3)
    said = ended(process, expected, seconds=20)
    assert "[0] said 3\n" in said
    assert "[1] said 3\n" in said
    for rank, code in enumerate(codes):
        failed = code not in (0, 75)
        assert (f"[{rank}] ended with exit code {code}\n" in said) == failed
