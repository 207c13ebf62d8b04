"""tpu_pod.sh against a fake gcloud: settings, create, sync, delete, and dry runs."""

import json
import shlex

import pytest

from tests.helpers.pod import COMMAND, verbs

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
        (("--config=missing.env", "create"), "/missing.env; copy launch/pod.env.example"),
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
        "tpu-vm describe",
    ]
    (call,) = pod.calls("create")
    assert call == (
        "queued-resources create spvit-test --project=my-project --zone=us-west4-a "
        "--node-id=spvit-test --accelerator-type=v4-24 "
        "--runtime-version=tpu-ubuntu2204-base --spot "
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


def test_what_cannot_be_looked_at_for_long_is_waited_for(pod):
    """A laptop without a network for a while must not leave a pod to come when nobody waits."""
    pod.plan(waits=12)
    process = pod.start("create")
    pod.wait_for(lambda: pod.calls("queued-resources create"))
    unavailable = "UNAVAILABLE: The service is unavailable."
    pod.plan(errors=[["queued-resources describe", unavailable, 6, False]])  # of 3 retries
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 0, said
    assert "cannot be looked at: ERROR: (gcloud.compute.tpus) UNAVAILABLE" in said
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
        assert "create it first" in pod(*args, code=2)
    assert "queued resource ABSENT, TPU VM ABSENT" in pod("status")


# ── Dry runs ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("verb", "calls"),
    [
        (["create"], ["describe", "describe", "create", "describe", "describe"]),
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
