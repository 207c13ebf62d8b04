"""tpu_pod.sh against a fake gcloud: settings, create, sync, delete, and dry runs."""

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
    "DATA_BUCKET": ["gs://my-data"],
    "RESERVATION": ["a b"],
    "MAX_RUN_DURATION": ["7", "7 days"],
    "PRICE_PER_CHIP_HOUR": ["$1", "1,20"],
    "INTERNAL_IPS": ["no"],
    "IAP": ["true"],
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


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RESERVATION": "r"}, "RESERVATION is 'r' and PROVISIONING is 'spot'; expected reserved"),
        ({"PROVISIONING": "flex-start"}, "'flex-start' without MAX_RUN_DURATION; set it"),
        ({"MAX_RUN_DURATION": "7d"}, "'7d' and PROVISIONING is 'spot'; it goes with flex-start"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(pod, changed, words):
    pod.settings(**changed)
    said = pod("create", code=2)
    assert words in said
    assert said.count("\n") == 1
    assert pod.calls() == []


def test_a_place_on_the_command_line_is_checked_as_well(pod):
    for key in ("NAME", "ZONE", "PROJECT"):
        said = pod(f"--{key.lower()}=a b", "delete", code=2)
        assert said.startswith(f"error: {key} is 'a b'; expected ")
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
        (("--delete_when_done", "create"), "--delete_when_done is a flag of run"),
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
    ("changed", "group", "flags"),
    [
        ({"PROVISIONING": "on-demand"}, "compute", []),
        ({"PROVISIONING": "reserved"}, "compute", ["--reserved"]),
        (
            {"PROVISIONING": "reserved", "RESERVATION": "mine"},
            "alpha",
            ["--reservation=mine"],
        ),
        (
            {"PROVISIONING": "flex-start", "MAX_RUN_DURATION": "7d"},
            "alpha",
            ["--provisioning-model=flex-start", "--max-run-duration=7d"],
        ),
    ],
)
def test_what_is_asked_for_is_what_the_settings_say(pod, changed, group, flags):
    account = "trainer@my-project.iam.gserviceaccount.com"
    pod.settings(SERVICE_ACCOUNT=account, NETWORK="net", INTERNAL_IPS="yes", **changed)
    (call,) = [line for line in pod("--dry_run", "create").splitlines() if " create " in line]
    words = shlex.split(call)
    kinds = ("--spot", "--reserv", "--provisioning", "--max-run")
    assert [word for word in words if word.startswith(kinds)] == flags
    assert {f"--service-account={account}", "--network=net", "--internal-ips"} <= set(words)
    assert words[1] == group


@pytest.mark.parametrize(
    ("changed", "group", "flag"),
    [
        ({}, "compute", None),
        ({"INTERNAL_IPS": "yes"}, "compute", "--internal-ip"),
        ({"INTERNAL_IPS": "yes", "IAP": "yes"}, "alpha", "--tunnel-through-iap"),
    ],
)
def test_workers_are_reached_as_the_settings_say(pod, changed, group, flag):
    pod.settings(**changed)
    printed = [
        shlex.split(line)
        for verb in (["sync"], ["run", "python", "train.py"], ["logs"])
        for line in pod("--dry_run", *verb).splitlines()
    ]
    calls = [line for line in printed if {"ssh", "scp"} & set(line)]
    assert len(calls) == 3 + 3 + 1
    for call in calls:
        assert call[1] == group
        found = [word for word in call if word in ("--internal-ip", "--tunnel-through-iap")]
        assert found == [flag] * bool(flag)


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
    assert not pod.record().exists()


REASON = """RESOURCE_EXHAUSTED: Quota exceeded.
- '@type': type.googleapis.com/google.rpc.ErrorInfo
  reason: the one that matters"""


@pytest.mark.parametrize("fails", [True, False], ids=["request", "call"])
def test_a_reason_of_several_lines_is_shown_whole(pod, fails):
    pod.plan(**{"fails": REASON} if fails else {"errors": [["create", REASON, 99, False]]})
    said = pod("create", code=1)
    assert REASON.replace("\n", "\n    ") in said


def test_a_request_that_fails_leaves_nothing_behind(pod):
    pod.plan(fails="There is no more capacity in the zone")
    said = pod("create", code=1)
    assert "the request failed: There is no more capacity in the zone" in said
    assert pod.state() == (None, None)
    assert not pod.record().exists()


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
    (pod.folder / "state").write_text(repr(pod.facts() | {"resource": None}))
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


def test_data_and_checkpoints_have_mounts_of_their_own(pod):
    """What other workers write is seen at once; what nobody writes is kept in mind."""
    pod.settings(DATA_BUCKET="my-data")
    pod("create")
    (pod.folder / "my-data/a").touch()
    pod("sync")
    for number in range(3):
        home = pod.folder / f"home-{number}"
        assert (home / "mounts/data/a").exists()
        calls = [line.split() for line in (home / "gcsfuse.log").read_text().splitlines()]
        assert [call[-2] for call in calls] == ["my-bucket", "my-data"]
        assert "--metadata-cache-ttl-secs=0" in calls[0]
        assert {"ro", "--metadata-cache-ttl-secs=-1"} <= set(calls[1])
    (pod.folder / "other-data").mkdir()
    pod.settings(DATA_BUCKET="other-data")
    pod("sync")  # the other bucket takes the place of the first; that of the runs stays
    for number in range(3):
        home = pod.folder / f"home-{number}"
        assert (home / "mounts/data").resolve() == pod.folder / "other-data"
        assert len((home / "gcsfuse.log").read_text().splitlines()) == 3


def test_a_bucket_that_cannot_be_mounted_is_said(pod):
    pod("create")
    script = '#!/bin/bash\n[[ $FAKE_WORKER != 1 ]] || { echo "bucket does not exist"; exit 1; }\n'
    (pod.folder / "worker-bin/gcsfuse").write_text(script)
    said = pod("sync", code=1)
    assert "error: worker 1 failed to mount a bucket: bucket does not exist" in said


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"workers": 2}, "has 2 workers, and v4-24 consists of 3; delete it"),
        ({"type": "v4-16"}, "is a v4-16, and ACCELERATOR is v4:2x2x3 (v4-24); delete it"),
    ],
)
def test_a_pod_that_is_not_what_the_settings_ask_for_is_refused(pod, plan, words):
    pod.ready()
    pod.plan(**plan)
    for args in ["create"], ["sync"], COMMAND:
        assert words in pod(*args, code=2)
    assert words.split(";")[0] in pod("status")
    assert pod.calls("scp") == pod.calls("worker.sh start") == []


def test_a_host_that_ssh_does_not_find_is_not_a_pod_that_is_not_there(pod):
    pod("create")
    host = "[/usr/bin/ssh] exited with return code [255].\nHost key for 10.0.0.2 was not found"
    keys = "Could not fetch resource: NOT_FOUND: the keys of the project"
    pod.plan(errors=[["tpu-vm scp", host, 1, False], ["tpu-vm scp", keys, 1, False]])
    said = pod("sync")
    assert "Host key for 10.0.0.2 was not found" in said
    assert f"try 2 of 4: ERROR: (gcloud.compute.tpus) {keys}" in said
    path = "projects/my-project/locations/us-west4-a/nodes/spvit-test"
    pod.plan(errors=[["tpu-vm scp", f"NOT_FOUND: Resource '{path}' was not found", 2, False]])
    assert "there is no TPU VM spvit-test" in pod("sync", code=1)


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
