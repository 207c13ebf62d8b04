"""tpu_pod.sh run and stop: one command on all workers, through failures and preemption."""

import ast
import signal

import pytest

from tests.helpers.pod import COMMAND, verbs


def test_run_starts_the_same_command_on_all_workers_and_keeps_their_logs(pod):
    pod.ready()
    tricky = ["--a=b c", 'it\'s "$HOME"', "*", "", "a\nb", "é;|&", "--config.x=(1, 2)"]
    said = pod(*COMMAND, *tricky)
    assert pod.starts() == [1, 1, 1]
    for number in range(3):
        given = ast.literal_eval((pod.folder / f"arguments-{number}").read_text())
        assert given == tricky
        log = pod.log(number)
        assert f"process {number} of 3, code {pod.version}, 4 of 12 devices" in log
        assert log.endswith("step 4\n")
    assert f"cluster of 3 workers, 12 devices, code {pod.version}" in said
    assert "step 4\n" in said  # worker 0 is shown as it goes
    assert len(pod.calls("worker.sh start", "--worker=all")) == 1


def test_run_needs_the_code(pod):
    pod("create")
    assert "have no code; send it with: launch/tpu_pod.sh sync" in pod(*COMMAND, code=2)


def test_after_preemption_the_pod_is_asked_for_again_and_the_run_goes_on(pod):
    pod.ready()
    before = pod.version
    behaviour = [{str(n): {"hang": True} for n in range(3)}, {}]
    pod.plan(behaviour=behaviour)
    process = pod.start(*COMMAND)
    pod.wait_for(lambda: pod.steps() == [4, 4, 4])
    (pod.checkout / "train.py").write_text("raise SystemExit(1)")
    pod.commit()  # which the run must not take up in its midst
    pod.plan(behaviour=behaviour, preempt=1)
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 0, said
    assert "the pod was taken away (queued resource SUSPENDED, TPU VM PREEMPTED)" in said
    assert verbs(
        [call for call in pod.calls() if "describe" not in call and "log" not in call]
    ) == [
        "tpu-vm ssh",
        "queued-resources delete",
        "queued-resources create",
        "tpu-vm scp",
        "tpu-vm ssh",
    ]
    assert pod.starts() == [2, 2, 2], said
    assert pod.log(0).splitlines()[:2] == [
        f"2026-11-22 01:02:03 cluster         process 0 of 3, code {before}, 4 of 12 devices",
        "start at step 4",
    ]


def test_half_a_pod_after_preemption_is_refused_and_not_tried_again(pod):
    pod.ready()
    behaviour = [{str(n): {"hang": True} for n in range(3)}]
    pod.plan(behaviour=behaviour)
    process = pod.start(*COMMAND)
    pod.wait_for(lambda: pod.starts() == [1, 1, 1])
    pod.plan(behaviour=behaviour, preempt=1, workers=2)
    said = pod.outcome(process, 2)
    assert "has 2 workers, and v4-24 consists of 3" in said
    pod.check_that_the_rest_is_named(said)
    assert len(pod.calls("queued-resources create")) == 1
    assert pod.calls("scp") == []


def test_exit_code_75_starts_the_command_again_on_the_same_pod(pod):
    pod.ready()
    pod.plan(behaviour=[{str(n): {"exit": 75} for n in range(3)}] * 2 + [{}])
    pod(*COMMAND, TPU_POD_TRIES="2")
    assert pod.starts() == [3, 3, 3]
    assert pod.calls("create") == pod.calls("delete") == pod.calls("scp") == []


def test_wrong_input_is_not_tried_again(pod):
    pod.ready()
    pod.plan(behaviour=[{"1": {"exit": 2, "report": False}, "2": {"exit": 1}}])
    said = pod(*COMMAND, code=2)
    assert pod.starts() == [1, 1, 1]
    assert "worker 1 2, worker 2 1" in said
    assert "error: this is why it ends with 2" in said


def test_a_failure_is_tried_again_a_few_times(pod):
    pod.ready()
    pod.plan(behaviour=[{"2": {"exit": 1}}])
    said = pod(*COMMAND, code=1, TPU_POD_TRIES="2")
    assert pod.starts() == [2, 2, 2]
    assert "error: failed 2 times; the last: exit codes: worker 0 0, worker 1 0, worker 2 1" in said
    assert "error: this is why it ends with 1" in said


def test_a_worker_that_does_not_report_is_named_and_all_are_ended(pod):
    pod.ready()
    hanging = {str(n): {"hang": True, "deaf": True} for n in range(3)}
    hanging["1"] |= {"report": False}
    pod.plan(behaviour=[hanging])
    said = pod(*COMMAND, code=1, TPU_POD_REPORT_TIMEOUT="1", TPU_POD_TRIES="1")
    assert "worker 1 did not report the cluster in 1 s" in said
    pod.wait_for(lambda: not pod.alive())


@pytest.mark.parametrize(
    ("workers", "behaviour", "words"),
    [
        (
            [2],
            {"version": "0123abc"},
            "worker 2 reports code 0123abc and 4 of 12 devices, worker 0",
        ),
        ([1], {"devices": 2}, "and 2 of 12 devices, worker 0"),
        ([0, 1, 2], {"devices": 2}, "the workers have 6 devices, and report a cluster of 12"),
    ],
)
def test_workers_that_differ_are_named_and_all_are_ended(pod, workers, behaviour, words):
    pod.ready()
    hanging = {str(n): {"hang": True} for n in range(3)}
    pod.plan(behaviour=[hanging | {str(n): {"hang": True} | behaviour for n in workers}])
    assert words in pod(*COMMAND, code=2)
    assert pod.starts() == [1, 1, 1]
    pod.wait_for(lambda: not pod.alive())


def test_a_cluster_that_has_ended_before_it_is_looked_at_is_checked_too(pod):
    pod.ready()
    short = {str(n): {"steps": 0} for n in range(3)}
    pod.plan(behaviour=[short, short | {"2": {"steps": 0, "version": "0123abc"}}])
    assert f"cluster of 3 workers, 12 devices, code {pod.version}" in pod(*COMMAND)
    assert "worker 2 reports code 0123abc and 4 of 12 devices, worker 0" in pod(*COMMAND, code=2)


def test_a_worker_that_hangs_when_the_others_have_ended_is_killed(pod):
    pod.ready()
    pod.plan(behaviour=[{"0": {"exit": 1}, "1": {"exit": 1}, "2": {"hang": True}}])
    said = pod(*COMMAND, code=1, TPU_POD_EXIT_GRACE="1", TPU_POD_TRIES="1")
    assert "worker 2 still runs 1 s after others ended; killing it" in said
    pod.wait_for(lambda: not pod.alive())


def test_a_worker_that_cannot_be_reached_for_a_while_does_not_end_the_run(pod):
    pod.ready()
    pod.plan(behaviour=[{"0": {"steps": 15}}], unreachable=[[2, 2, 4, 0]])
    said = pod(*COMMAND)
    assert "worker 2 did not answer" in said
    assert pod.starts() == [1, 1, 1]


def test_stop_lets_the_workers_save_and_ends_the_run(pod):
    pod.ready()
    pod.plan(behaviour=[{str(n): {"hang": True} for n in range(3)}])
    process = pod.start(*COMMAND)
    pod.wait_for(lambda: pod.starts() == [1, 1, 1])
    assert "is running, code" in pod("status")
    assert "is running a command; stop it first" in pod("sync", code=2)
    pod("stop")
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 75, said
    assert "stopped as asked" in said
    assert pod.log(1).endswith("saved\n")
    assert pod("logs", "1") == pod.log(1)
    assert pod.starts() == [1, 1, 1]
    assert "ended with exit code 75" in pod("status")


def test_stop_kills_what_does_not_end(pod):
    pod.ready()
    pod.plan(behaviour=[{"1": {"hang": True, "deaf": True}}])
    process = pod.start(*COMMAND, TPU_POD_TRIES="1")
    pod.wait_for(lambda: pod.starts() == [1, 1, 1])
    assert "worker 1 still runs after 1 s; killing it" in pod("stop", TPU_POD_STOP_TIMEOUT="1")
    process.communicate(timeout=60)
    assert process.returncode == 75
    pod.wait_for(lambda: not pod.alive())


@pytest.mark.parametrize("others", [True, False], ids=["all", "one"])
def test_the_run_goes_on_without_its_follower_and_is_joined_again(pod, others):
    pod.ready()
    hanging = {"0": {"hang": True}, "1": {"hang": others}, "2": {"hang": others}}
    pod.plan(behaviour=[hanging])
    process = pod.start(*COMMAND, "--a=b")
    pod.wait_for(lambda: pod.steps() == [4, 4, 4] and len(pod.calls("worker.sh log")) > 0)
    process.send_signal(signal.SIGTERM)
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 130
    assert "the workers go on without this program" in said
    assert "is running another command" in pod(*COMMAND, "--a=c", code=2)
    looks = len(pod.calls("worker.sh status"))
    process = pod.start(*COMMAND, "--a=b")
    pod.wait_for(lambda: len(pod.calls("worker.sh status")) > looks + 1)
    (pod.folder / "release").touch()
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 0, said
    assert "is running this command already" in said
    assert pod.starts() == [1, 1, 1]
    assert pod.log(0).splitlines()[1:] == ["start at step 0", *(f"step {n}" for n in range(1, 5))]


def test_a_command_that_only_some_workers_run_is_started_anew_on_all(pod):
    pod.ready()
    pod.plan(behaviour=[{str(n): {"hang": True} for n in range(3)}, {}])
    process = pod.start(*COMMAND)
    pod.wait_for(lambda: pod.starts() == [1, 1, 1])
    process.kill()
    process.communicate()
    (pod.folder / "home-2/spvit_jax_run/id").unlink()  # as if it had not been started there
    assert "only worker 0, 1 has a part; starting it anew on all" in pod(*COMMAND)
    assert pod.starts() == [2, 2, 2]


def test_a_start_whose_answer_was_lost_is_not_done_twice(pod):
    pod.ready()
    pod.plan(errors=[["worker.sh start", "Connection reset", 1, True]], unreachable=[[2, 1, 1, 0]])
    pod(*COMMAND)
    assert pod.starts() == [1, 1, 1]


def test_a_pod_that_somebody_deletes_is_not_asked_for_again(pod):
    pod.ready()
    pod.plan(behaviour=[{str(n): {"hang": True} for n in range(3)}])
    process = pod.start(*COMMAND)
    pod.wait_for(lambda: pod.starts() == [1, 1, 1])
    pod("delete")
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 1, said
    assert "was deleted; the run ends" in said
    assert pod.state() == (None, None)
    assert pod.calls("create") == []


def test_a_refusal_while_the_pod_is_brought_back_ends_the_run(pod):
    pod.ready()
    pod.plan(
        behaviour=[{str(n): {"hang": True} for n in range(3)}],
        preempt=1,
        errors=[["create", "PERMISSION_DENIED: not any more", 99, False]],
    )
    assert "PERMISSION_DENIED: not any more" in pod(*COMMAND, code=1)
    assert len(pod.calls("create")) == 1
    assert pod.state() == (None, None)
