"""tpu_pod.sh against a fake gcloud: the calls, what is left behind, and what it says."""

import json
import shlex
import shutil
import signal

import pytest

COMMAND = ("run", "python", "train.py")


def verbs(calls):
    """The first two words of each call, repetitions in a row counted once."""
    verbs = [" ".join(call.split()[:2]) for call in calls]
    return [verb for verb, before in zip(verbs, [None, *verbs], strict=False) if verb != before]


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


NOT_RIGHT = {
    "NAME": ["my pod", "pod;reboot", "$(reboot)", "'pod'", "a|b", "Pod", "a/b", "-pod", ""],
    "PROJECT": ["my project", "p`id`ject", "p"],
    "ZONE": ["us-west4", "us-west4-a --spot"],
    "ACCELERATOR": ["v5e:4x4;id", "v5e 4x4", "h100-8", "v5e:4x"],
    "PROVISIONING": ["preemptible", ""],
    "BUCKET": ["gs://my-bucket", "my bucket", "a&b"],
    "RUNTIME_VERSION": ["v2 alpha"],
    "SERVICE_ACCOUNT": ["a@b|c"],
    "NETWORK": ["a&b"],
}


@pytest.mark.parametrize("key", NOT_RIGHT)
def test_values_that_could_not_be_right_are_refused_before_any_call(pod, key):
    for value in NOT_RIGHT[key]:
        pod.settings(**{key: value})
        said = pod("delete", code=2)
        assert said.startswith(f"error: {key} is '{value}'; expected ")
        assert said.count("\n") == 1
    assert pod.calls() == []


def test_a_name_on_the_command_line_is_checked_as_well(pod):
    said = pod("--name=a b", "delete", code=2)
    assert said.startswith("error: NAME is 'a b'; expected ")
    assert pod.calls() == []


def test_a_settings_file_is_not_executed(pod):
    pod.settings(NAME="$(touch executed)")
    pod("create", code=2)
    (pod.checkout / "launch/pod.env").write_text("touch executed\n")
    assert "line 1 is 'touch executed'; expected KEY=VALUE" in pod("create", code=2)
    (pod.checkout / "launch/pod.env").write_text("PATH=/tmp\n")
    assert "sets PATH; known settings are PROJECT ZONE" in pod("create", code=2)
    assert not (pod.checkout / "executed").exists()


def test_mistakes_on_the_command_line_are_one_line(pod):
    for args, words in [
        (("crate",), "unknown verb 'crate'"),
        (("create", "now"), "unexpected argument 'now'"),
        (("--dry-run", "create"), "unknown flag '--dry-run'"),
        (("run",), "run needs a command"),
        (("logs", "first"), "'first' is no worker's number"),
        (("--config=missing.env", "create"), "there is no settings file missing.env"),
    ]:
        said = pod(*args, code=2)
        assert said.startswith("error: ")
        assert words in said
        assert said.count("\n") == 1
    assert pod.calls() == []


@pytest.mark.parametrize(
    ("accelerator", "flags"),
    [
        ("v5e:16x16", "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite"),
        ("v6e:4x4", "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"),
        ("v5p:2x2x2", "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5"),
        ("v4:2x2x4", "--accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base"),
        ("v5litepod-8", "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite"),
    ],
)
def test_a_topology_of_preflight_becomes_the_name_that_gcloud_knows(pod, accelerator, flags):
    pod.settings(ACCELERATOR=accelerator)
    assert flags in pod("--dry_run", "create")


# ── Creating and deleting ─────────────────────────────────────────────────────────────────────────


def test_create_asks_once_and_waits_until_the_pod_is_there(pod):
    said = pod("create")
    assert verbs(pod.calls()) == [
        "queued-resources describe",
        "tpu-vm describe",
        "queued-resources create",
        "queued-resources describe",
    ]
    (call,) = pod.calls("create")
    assert call == (
        "queued-resources create spvit-test --project=my-project --zone=us-west4-a "
        "--node-id=spvit-test --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot "
        "--scopes=https://www.googleapis.com/auth/cloud-platform --async"
    )
    assert "WAITING_FOR_RESOURCES" in said
    assert pod.state() == ("ACTIVE", "READY")
    pod("create")  # is there already
    assert len(pod.calls("create")) == 1


@pytest.mark.parametrize(
    ("provisioning", "flags"), [("on-demand", set()), ("reserved", {"--reserved"})]
)
def test_what_is_asked_for_is_what_the_settings_say(pod, provisioning, flags):
    account = "trainer@my-project.iam.gserviceaccount.com"
    pod.settings(PROVISIONING=provisioning, SERVICE_ACCOUNT=account, NETWORK="net")
    (call,) = [line for line in pod("--dry_run", "create").splitlines() if " create " in line]
    words = set(shlex.split(call))
    assert words & {"--spot", "--reserved"} == flags
    assert {f"--service-account={account}", "--network=net"} <= words


def test_what_may_pass_is_tried_again(pod):
    pod.plan(
        errors=[
            ["queued-resources describe", "UNAVAILABLE: The service is unavailable.", 2, False],
            # The request was taken, and the answer was lost: the next try finds it.
            ["queued-resources create", "DEADLINE_EXCEEDED: Deadline exceeded.", 1, True],
            ["tpu-vm describe", "429: Quota 'Reads per minute' exceeded; rateLimitExceeded", 1, 0],
        ]
    )
    said = pod("create")
    assert "try 2 of 4: ERROR: (gcloud.compute.tpus) UNAVAILABLE" in said
    assert len(pod.calls("queued-resources create")) == 2
    assert pod.state() == ("ACTIVE", "READY")


def test_what_does_not_pass_ends_after_the_retries(pod):
    pod.plan(errors=[["describe", "UNAVAILABLE: The service is unavailable.", 99, False]])
    assert "error: gcloud failed 4 times: " in pod("create", code=1)
    assert len(pod.calls()) == 4


@pytest.mark.parametrize(
    "message",
    [
        "PERMISSION_DENIED: The caller does not have permission",
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has "
        "been exceeded. Limit: 0 in zone us-west4-a.",
        "You do not currently have an active account selected.",
    ],
)
def test_a_refusal_is_not_tried_again(pod, message):
    pod.plan(errors=[["create", message, 99, False]])
    assert f"error: gcloud refused: ERROR: (gcloud.compute.tpus) {message}" in pod("create", code=1)
    assert len(pod.calls("create")) == 1


def test_a_request_that_fails_leaves_nothing_behind(pod):
    pod.plan(fails="There is no more capacity in the zone")
    said = pod("create", code=1)
    assert "the request failed: There is no more capacity in the zone" in said
    assert pod.state() == (None, None)


def test_delete_returns_when_all_is_gone(pod):
    pod.ready()
    pod.plan(deleting=3)
    said = pod("delete")
    assert pod.state() == (None, None)
    assert "gone: queued resource and TPU VM" in said
    assert len(pod.calls("delete", "--force", "--quiet", "--async")) == 1
    pod("delete")  # nothing is there, and that is well
    assert len(pod.calls("delete")) == 1


def test_delete_of_a_pod_that_is_half_made(pod):
    """While it is being made it cannot be deleted; its VM outlives the queued resource."""
    pod.ready()
    busy = "FAILED_PRECONDITION: the resource is in state PROVISIONING"
    pod.plan(errors=[["queued-resources delete", busy, 2, False]], orphans=True)
    pod("delete")
    assert pod.state() == (None, None)
    assert len(pod.calls("queued-resources delete")) == 3
    assert len(pod.calls("tpu-vm delete")) == 1


def test_delete_says_so_if_something_stays(pod):
    pod.ready()
    pod.plan(deleting=10**6)
    said = pod("delete", code=1, TPU_POD_DELETE_TIMEOUT="1")
    assert "error: the queued resource spvit-test is still DELETING" in said


def test_create_does_not_take_over_a_vm_that_it_did_not_ask_for(pod):
    pod.ready()
    pod.plan(orphans=True)
    state = json.loads((pod.folder / "state.json").read_text())
    (pod.folder / "state.json").write_text(json.dumps(state | {"resource": None}))
    assert "there is a TPU VM spvit-test without a queued resource" in pod("create", code=2)
    assert pod.state() == (None, "READY")


# ── Code ──────────────────────────────────────────────────────────────────────────────────────────


def test_sync_brings_the_committed_code_to_all_workers(pod):
    pod("create")
    (pod.checkout / "train.py").write_text("not committed")
    said = pod("sync")
    assert "without your uncommitted changes" in said
    for number in range(3):
        home = pod.folder / f"home-{number}"
        assert (home / "spvit_jax/VERSION").read_text() == pod.version + "\n"
        assert "not committed" not in (home / "spvit_jax/train.py").read_text()
        assert "requirements-tpu.txt" in (home / "pip.log").read_text()
    pod.git("checkout", "train.py")
    (pod.checkout / "train.py").unlink()
    pod.commit()
    pod("sync")
    for number in range(3):
        home = pod.folder / f"home-{number}"
        assert (home / "spvit_jax/VERSION").read_text() == pod.version + "\n"
        assert not (home / "spvit_jax/train.py").exists()
        # The requirements are the same, and so is the environment.
        assert len((home / "pip.log").read_text().splitlines()) == 1


def test_what_goes_wrong_on_a_worker_is_said(pod):
    pod("create")
    script = pod.folder / "worker-bin/python"
    script.write_text('#!/bin/bash\n[[ $FAKE_WORKER != 1 ]] || { echo "no space left"; exit 1; }\n')
    said = pod("sync", code=1)
    assert "error: worker 1 failed, see spvit_jax_install.log: no space left" in said


def test_verbs_that_need_a_pod_say_that_there_is_none(pod):
    for args in ["sync"], ["stop"], COMMAND:
        assert "create it first" in pod(*args, code=2) or args == ["stop"]
    assert "queued resource ABSENT, TPU VM ABSENT" in pod("status")


# ── Running ───────────────────────────────────────────────────────────────────────────────────────


def test_run_starts_the_same_command_on_all_workers_and_keeps_their_logs(pod):
    pod.ready()
    tricky = ["--a=b c", 'it\'s "$HOME"', "*", "", "a\nb", "é;|&", "--config.x=(1, 2)"]
    said = pod(*COMMAND, *tricky)
    assert pod.starts() == [1, 1, 1]
    for number in range(3):
        given = json.loads((pod.folder / f"arguments-{number}.json").read_text())
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


def test_a_worker_that_hangs_when_the_others_have_ended_is_killed(pod):
    pod.ready()
    pod.plan(behaviour=[{"0": {"exit": 1}, "1": {"exit": 1}, "2": {"hang": True}}])
    said = pod(*COMMAND, code=1, TPU_POD_EXIT_GRACE="1", TPU_POD_TRIES="1")
    assert "worker 2 still runs 1 s after others ended; killing it" in said
    pod.wait_for(lambda: not pod.alive())


def test_a_worker_that_cannot_be_reached_for_a_while_does_not_end_the_run(pod):
    pod.ready()
    pod.plan(behaviour=[{"0": {"steps": 15}}], unreachable=[[2, 2, 4]])
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
    shutil.rmtree(pod.folder / "home-2/spvit_jax_run")  # as if its disk were new
    assert "only worker 0, 1 has a part; starting it anew on all" in pod(*COMMAND)
    assert pod.starts() == [2, 2, 2]


def test_a_start_whose_answer_was_lost_is_not_done_twice(pod):
    pod.ready()
    pod.plan(errors=[["worker.sh start", "Connection reset", 1, True]], unreachable=[[2, 1, 1]])
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


# ── Dry runs ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("verb", "calls"),
    [
        (["create"], ["describe", "describe", "create", "describe"]),
        (["sync"], ["describe", "ssh", "describe", "scp", "ssh"]),
        (["run", "python", "train.py"], ["describe", "describe", "ssh", "ssh", "ssh"]),
        (["status"], ["describe", "describe", "ssh"]),
        (["logs", "2"], ["ssh"]),
        (["stop"], ["describe", "ssh", "ssh"]),
        (["delete"], ["describe", "delete", "describe", "describe"]),
    ],
)
def test_a_dry_run_prints_the_calls_and_does_none(pod, verb, calls):
    printed = [shlex.split(line) for line in pod("--dry_run", *verb).splitlines()]
    assert [line[:3] for line in printed] == [["gcloud", "compute", "tpus"]] * len(calls)
    assert [line[4] for line in printed] == calls
    assert pod.calls() == []
    assert not (pod.checkout / "runs").exists()


def test_a_dry_run_quotes_what_a_shell_would_change(pod):
    tricky = ["a b", "it's", "$HOME", "*;|&"]
    printed = [shlex.split(line) for line in pod("--dry_run", *COMMAND, *tricky).splitlines()]
    (command,) = [word for line in printed for word in line if "worker.sh start" in word]
    assert shlex.split(command.removeprefix("--command="))[-4:] == tricky
