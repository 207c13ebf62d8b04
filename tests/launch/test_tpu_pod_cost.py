"""tpu_pod.sh and what costs money: what is asked for is deleted, or named with what it costs."""

import signal
import subprocess

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.pod import COMMAND, DELETE, PLACE

# ── Accelerators ──────────────────────────────────────────────────────────────────────────────────


def ask(command, price=""):
    """What lib/accelerator.sh answers."""
    script = f"PRICE_PER_CHIP_HOUR={price}; source launch/lib/accelerator.sh; {command}"
    return subprocess.check_output(["bash", "-euc", script], cwd=REPOSITORY, text=True).split("\n")


def test_chips_and_vms_of_each_type():
    """As Google's tables of accelerator types have them."""
    table = {
        "v2-8": (4, 1),
        "v4-8": (4, 1),
        "v4-32": (16, 4),
        "v5litepod-1": (1, 1),
        "v5litepod-8": (8, 1),
        "v5litepod-16": (16, 4),
        "v5litepod-256": (256, 64),
        "v5p-8": (4, 1),
        "v5p-128": (64, 16),
        "v6e-8": (8, 1),
        "v6e-64": (64, 16),
    }
    answers = ask(f"for type in {' '.join(table)}; do chips_of $type; vms_of $type; done")
    expected = [str(number) for row in table.values() for number in row]
    assert answers[:-1] == expected


def test_what_a_pod_costs():
    """Chips times the price of one: of the list, or the user's own."""
    (said, _) = ask("cost_of v5litepod-256")
    assert said == "307.20 USD per hour (256 chips at 1.20, list price on demand, US, 2025)"
    (said, _) = ask("cost_of v5p-8", price="0.5")
    assert said == "2.00 USD per hour (4 chips at 0.5, the settings)"
    (said, _) = ask("cost_of v2-8")
    assert said == "at a price unknown here (set PRICE_PER_CHIP_HOUR) for 4 chips"


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────


def in_the_queue(pod, *args):
    """Starts a verb and waits until it waits for a request that is not granted."""
    process = pod.start(*args)
    pod.wait_for(lambda: pod.state()[0] == "WAITING_FOR_RESOURCES")
    return process


def withdraw(pod, said):
    """Runs the command that was offered."""
    assert DELETE in said
    pod(*PLACE.split(), "delete")
    assert pod.state() == (None, None)
    assert not pod.record().exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_who_ends_create_in_the_queue_is_told_what_may_come(pod, name):
    pod.plan(waits=10**6)
    process = in_the_queue(pod, "create")
    process.send_signal(getattr(signal, name))
    said = pod.outcome(process, 130)
    assert "may be in the queue of us-west4-a, and becomes a pod that costs 38.64 USD" in said
    withdraw(pod, said)


def test_who_ends_a_run_in_the_queue_after_preemption_is_told_what_may_come(pod):
    pod.ready()
    pod.plan(behaviour=[{str(n): {"hang": True} for n in range(3)}], preempt=1, waits=10**6)
    process = in_the_queue(pod, *COMMAND)
    process.send_signal(signal.SIGTERM)
    said = pod.outcome(process, 130)
    assert "the workers go on" not in said
    assert "may be in the queue of us-west4-a" in said
    withdraw(pod, said)


def test_what_a_killed_create_has_asked_for_is_listed(pod):
    pod.plan(waits=10**6)
    process = in_the_queue(pod, "create")
    process.kill()
    process.communicate()
    said = pod("list")
    assert "spvit-test: v4-24 (spot) in us-west4-a of my-project, asked for 20" in said
    assert "queued resource WAITING_FOR_RESOURCES, TPU VM ABSENT" in said
    withdraw(pod, said)
    assert "no pod has been asked for from here" in pod("list")


def test_what_is_gone_is_listed_once_more_and_forgotten(pod):
    pod.ready()
    (pod.folder / "state").unlink()  # somebody has deleted it in the console
    assert "queued resource ABSENT, TPU VM ABSENT" in pod("list")
    assert "no pod has been asked for from here" in pod("list")


# ── Deleting ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("recorded", [True, False], ids=["asked here", "asked elsewhere"])
@pytest.mark.parametrize("changed", [{"ZONE": "us-east1-c"}, {"PROJECT": "other-project"}])
def test_delete_at_another_place_does_not_say_gone(pod, changed, recorded):
    """By the record; without, by looking at all zones of the project."""
    pod.ready()
    pod.settings(**changed)
    if not recorded:
        pod.record().rename(pod.path / "record")
    if recorded or "ZONE" in changed:
        said = pod("delete", code=2)
        assert "error: nothing was deleted: the pod spvit-test is in us-west4-a of my-proj" in said
        assert DELETE in said
        assert "gone" not in said
    else:
        assert "nothing was deleted: there is no spvit-test in us-west4-a" in pod("delete")
    assert pod.state() == ("ACTIVE", "READY")
    pod(*PLACE.split(), "delete")


def test_delete_of_what_never_was_says_so(pod):
    assert "nothing was deleted: there is no spvit-test in us-west4-a" in pod("delete")
    assert len(pod.calls("list", "--zone=-")) == 2
    pod.plan(errors=[["list", "UNAVAILABLE: The service is unavailable.", 99, False]])
    assert "other zones of my-project could not be looked at" in pod("delete")


def test_a_pod_at_another_place_is_no_secret(pod):
    pod.ready()
    pod.settings(ZONE="us-east1-c")
    for args, code in (["status"], 0), (["sync"], 2), (["stop"], 2):
        said = pod(*args, code=code)
        assert "a pod spvit-test has been asked for in us-west4-a of my-project as well" in said
        assert DELETE in said


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


def test_after_the_run_the_pod_stays_on_and_is_named(pod):
    """`pod` checks that the command that deletes it is told, too."""
    pod.ready()
    assert "stays on in us-west4-a and costs 38.64 USD per hour" in pod(*COMMAND)
    assert pod.state() == ("ACTIVE", "READY")


@pytest.mark.parametrize(("exit_code", "code"), [(0, 0), (1, 1), (2, 2)])
def test_delete_when_done(pod, exit_code, code):
    pod.ready()
    pod.plan(behaviour=[{"1": {"exit": exit_code, "steps": 1}}])
    run = ("run", "--delete_when_done", *COMMAND[1:])
    said = pod(*run, code=code, TPU_POD_TRIES="1")
    assert "gone: queued resource and TPU VM" in said
    assert pod.state() == (None, None)
    assert said.splitlines()[-1].startswith("error: ") == bool(code)


def test_delete_when_done_would_delete_what_is_on_the_workers_disks(pod):
    pod.ready()
    pod.settings(BUCKET="")
    run = ("run", "--delete_when_done", *COMMAND[1:])
    assert "would delete what the run has saved; expected a BUCKET" in pod(*run, code=2)
    assert pod.calls() == []
    pod(*run, "--workdir=gs://my-bucket/run")
    assert pod.state() == (None, None)


def test_who_asks_for_the_run_to_stop_keeps_the_pod(pod):
    pod.ready()
    pod.plan(behaviour=[{str(n): {"hang": True} for n in range(3)}])
    process = pod.start("run", "--delete_when_done", *COMMAND[1:])
    pod.wait_for(lambda: pod.starts() == [1, 1, 1])
    pod("stop")
    pod.check_that_the_rest_is_named(pod.outcome(process, 75))
    assert pod.state() == ("ACTIVE", "READY")


# ── Workers that are lost ─────────────────────────────────────────────────────────────────────────


def test_a_pod_of_which_a_vm_cannot_be_reached_is_replaced(pod):
    pod.ready()
    pod.plan(unreachable=[[2, 1, 99, 1]])  # in its first life
    said = pod(*COMMAND)
    assert "worker 2 cannot be reached: ERROR: " in said
    assert "the pod is replaced; getting it back" in said
    assert len(pod.calls("queued-resources delete")) == 1
    assert len(pod.calls("queued-resources create")) == 1
    assert pod.starts() == [1, 1, 1]


def test_a_healthy_pod_that_is_cut_off_from_this_machine_is_not_replaced(pod):
    pod.ready()
    silent = [[n, 1, 99, 1] for n in range(3)]
    pod.plan(unreachable=silent)
    said = pod(*COMMAND, code=1)
    assert "no worker of spvit-test can be reached, and the TPU VM is READY and healthy" in said
    assert pod.calls("delete") == []
    pod.plan(unreachable=silent, health="UNHEALTHY_MAINTENANCE")
    assert "the pod is replaced" in pod(*COMMAND)


def test_a_worker_that_only_ssh_does_not_reach_goes_on(pod):
    """The others could not run without it: replacing the pod would lose what they have done."""
    pod.ready()
    hanging = {str(n): {"hang": True} for n in range(3)}
    pod.plan(behaviour=[hanging])
    process = pod.start(*COMMAND)
    pod.wait_for(lambda: all(pod.steps()))
    looks = pod.facts()["looks"] + 3  # by then the script has read that all have met
    pod.plan(behaviour=[hanging], unreachable=[[2, looks, looks + 8, 0]])
    pod.wait_for(lambda: pod.facts()["looks"] > looks + 9)
    (pod.folder / "release").touch()
    said = pod.outcome(process, 0)
    assert "worker 2 cannot be reached, and goes on: the others, which run, need it" in said
    assert pod.calls("delete") == []
    assert pod.starts() == [1, 1, 1]


@pytest.mark.parametrize("exit_code", [75, 137])
def test_the_loss_of_a_machine_is_no_failure_of_the_run(pod, exit_code):
    """The others end with 75 for it, as for one that was killed, which has a code of its own."""
    pod.ready()
    ends = {"0": {"exit": 75}, "1": {"vanish": True}, "2": {"exit": exit_code}}
    pod.plan(behaviour=[ends, {}])
    failed = exit_code != 75
    said = pod(*COMMAND, code=int(failed), TPU_POD_TRIES="1")
    assert f"exit codes: worker 0 75, worker 1 lost, worker 2 {exit_code}" in said
    assert pod.starts() == ([1, 1, 1] if failed else [2, 2, 2])


@pytest.mark.parametrize("exit_code", [126, 127])
def test_a_command_that_cannot_be_run_is_not_tried_again(pod, exit_code):
    pod.ready()
    pod.plan(behaviour=[{"1": {"exit": exit_code}, "2": {"exit": 1}}])
    assert f"error: wrong input: exit codes: worker 0 0, worker 1 {exit_code}" in pod(
        *COMMAND, code=2
    )
    assert pod.starts() == [1, 1, 1]
