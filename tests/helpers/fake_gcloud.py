"""Stands in for gcloud: keeps a pod's state in a folder, records calls, fails and preempts as told.

Its workers are processes of this machine, each with a home folder of its own, which live and die
with the pod. The folder, named by FAKE_GCLOUD, has `plan` (what goes wrong; see `PLAN`), `state`,
`calls`, a folder of each bucket, and `home-N/` of each worker. The three are Python literals, since
a test makes dozens of calls, and importing `json` or `re` takes longer than a call.
"""

import fcntl
import os
import sys

FOLDER = os.environ["FAKE_GCLOUD"]
HERE = ("my-project", "us-west4-a")  # the only place where there is ever something
NAME = "spvit-test"
PATH = f"projects/{HERE[0]}/locations/{HERE[1]}"
PLAN = {
    "workers": 3,
    "waits": 2,  # how often a new request is looked at before it is active
    "fails": None,  # why requests fail, if they do
    "deleting": 1,  # how often a resource that is being deleted is still seen
    "errors": [],  # [words in the call, message, times, whether the call takes effect all the same]
    "preempt": 0,  # which life of the pod ends at the next look at the workers, counted from 1
    # [worker, from the n-th look at the workers on, up to the m-th, in which life (0: in all)]
    "unreachable": [],
    "health": "HEALTHY",
    "type": None,  # what the pod is of, if not what it was asked for as
    "orphans": False,  # deleting a queued resource leaves its VM behind
}
EMPTY = {"resource": None, "node": None, "type": "", "looks": 0, "lives": 0, "errors": []}


def main() -> int:
    args = sys.argv[1:]
    with open(f"{FOLDER}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan = PLAN | read("plan")
        state = EMPTY | read("state")
        with open(f"{FOLDER}/calls", "a") as calls:
            calls.write(f"{args!r}\n")
        try:
            error = planned_error(plan, state, args)
            if error and not error[3]:
                raise Refused(error[1])
            commands = answer(plan, state, args)
        except Refused as refused:
            print(refused, file=sys.stderr)
            return 1
        finally:
            with open(f"{FOLDER}/state.new", "w") as file:
                file.write(repr(state))
            os.replace(file.name, f"{FOLDER}/state")  # tests read it at any time
    # Not under the lock: workers run side by side, and so do calls.
    if error:  # what was asked for is done, and the answer is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = run_all(commands)
    if error:
        print(Refused(error[1]), file=sys.stderr)
        return 1
    return code


def read(name):
    try:
        with open(f"{FOLDER}/{name}") as file:
            return eval(file.read())
    except FileNotFoundError:
        return {}


class Refused(Exception):
    def __init__(self, message):
        super().__init__(f"ERROR: (gcloud.compute.tpus) {message}")


def planned_error(plan, state, args):
    for index, error in enumerate(plan["errors"]):
        done = state["errors"][index : index + 1] or [0]
        if all(word in " ".join(args) for word in error[0].split()) and done[0] < error[2]:
            state["errors"] = (state["errors"] + [0] * len(plan["errors"]))[: len(plan["errors"])]
            state["errors"][index] += 1
            return error
    return None


def answer(plan, state, args):
    """Does what a call asks for; returns the commands that it runs on workers."""
    if args[0] == "alpha":
        args = args[1:]
    assert args[:2] == ["compute", "tpus"], args
    group, verb, *rest = args[2:]
    flags = dict(arg[2:].partition("=")[::2] for arg in rest if arg.startswith("--"))
    words = [arg for arg in rest if not arg.startswith("--")]
    if verb == "list":
        list_all(state, group, flags)
        return []
    if (flags["project"], flags["zone"]) != HERE:
        assert verb == "describe", args
        raise Absent(f"projects/{flags['project']}/locations/{flags['zone']}", group)
    if (group, verb) == ("queued-resources", "create"):
        create(plan, state, words, flags)
    elif (group, verb) == ("queued-resources", "describe"):
        describe_resource(plan, state, flags)
    elif (group, verb) == ("queued-resources", "delete"):
        delete_resource(plan, state, flags)
    elif (group, verb) == ("tpu-vm", "describe"):
        describe_node(plan, state)
    elif (group, verb) == ("tpu-vm", "delete"):
        find(state, "node")
        state["node"] = ["DELETING", plan["deleting"]]
        end_of_workers(state)
    elif (group, verb) == ("tpu-vm", "scp"):
        source, (name, _, target) = words[0], words[1].partition(":")
        assert name == NAME, name
        return [(n, f"cp {source} $HOME/{target}") for n in reachable(plan, state, flags)]
    elif (group, verb) == ("tpu-vm", "ssh"):
        if "worker.sh status" in flags["command"]:
            state["looks"] += 1
            if state["lives"] == plan["preempt"] and state["resource"][0] == "ACTIVE":
                state["resource"], state["node"] = ["SUSPENDED", 0], ["PREEMPTED", 0]
                end_of_workers(state)
        # gcloud splits the command at spaces, and ssh puts it together again.
        command = " ".join(flags["command"].split(" "))
        return [(n, command) for n in reachable(plan, state, flags)]
    else:
        raise Refused(f"Invalid choice: '{verb}'.")
    return []


class Absent(Refused):
    def __init__(self, path, group):
        kind = {"queued-resources": "queuedResources", "tpu-vm": "nodes"}[group]
        super().__init__(f"NOT_FOUND: Resource '{path}/{kind}/{NAME}' was not found")


def find(state, what):
    if state[what] is None:
        raise Absent(PATH, {"resource": "queued-resources", "node": "tpu-vm"}[what])
    return state[what]


def list_all(state, group, flags):
    assert flags["zone"] == "-", flags
    what, kind = {
        "queued-resources": ("resource", "queuedResources"),
        "tpu-vm": ("node", "nodes"),
    }[group]
    if state[what] and flags["project"] == HERE[0]:
        print(f"{PATH}/{kind}/another-{NAME}\n{PATH}/{kind}/{NAME}")


def create(plan, state, words, flags):
    if state["resource"] is not None:
        raise Refused(f"ALREADY_EXISTS: Resource '{PATH}/queuedResources/{NAME}' already exists")
    assert words == [NAME], words
    assert flags["node-id"] == NAME, flags
    state["resource"] = ["WAITING_FOR_RESOURCES", plan["waits"]]
    state["type"] = flags["accelerator-type"]


def describe_resource(plan, state, flags):
    resource = find(state, "resource")
    if "failedData" in flags["format"]:
        print(plan["fails"] or "")
        return
    resource[1] -= 1
    if resource[1] <= 0:
        if resource[0] == "DELETING":
            state["resource"] = None
            find(state, "resource")
        elif resource[0] == "WAITING_FOR_RESOURCES" and plan["fails"]:
            resource[0] = "FAILED"
        elif resource[0] == "WAITING_FOR_RESOURCES":
            resource[0], state["node"] = "ACTIVE", ["READY", 0]
            state["lives"] += 1
            for number in range(plan["workers"]):
                os.mkdir(f"{FOLDER}/home-{number}")
    print(resource[0])


def delete_resource(plan, state, flags):
    find(state, "resource")
    if state["node"] and "force" not in flags:
        raise Refused("FAILED_PRECONDITION: the queued resource has nodes")
    state["resource"] = ["DELETING", plan["deleting"] + 1]
    if not plan["orphans"]:
        state["node"] = None
    end_of_workers(state)


def describe_node(plan, state):
    node = find(state, "node")
    if node[0] == "DELETING":
        node[1] -= 1
        if node[1] < 0:
            state["node"] = None
            find(state, "node")
    print(f"{node[0]},{plan['health']},{plan['workers']},{plan['type'] or state['type']}")


def end_of_workers(state):
    """Kills what the workers run; their disks are kept aside, for the tests to look at."""
    for home in [name for name in os.listdir(FOLDER) if name.startswith("home-")]:
        try:
            with open(f"{FOLDER}/{home}/spvit_jax_run/pid") as file:
                os.killpg(int(file.read()), 9)
        except (OSError, ValueError):
            pass  # it runs nothing
        os.rename(f"{FOLDER}/{home}", f"{FOLDER}/life-{state['lives']}-{home}")


def reachable(plan, state, flags):
    node = find(state, "node")
    if node[0] != "READY":
        raise Refused(f"The TPU VM is in the terminal state {node[0]} and cannot be used.")
    numbers = range(plan["workers"]) if flags["worker"] == "all" else [int(flags["worker"])]
    lost = {
        n
        for n, first, last, life in plan["unreachable"]
        if first <= state["looks"] <= last and life in (0, state["lives"])
    }
    return [-1 if n in lost else n for n in numbers]


def run_all(commands):
    """Runs commands on workers at the same time; returns the first exit code that is not 0."""
    processes = []
    for number, command in commands:
        home = f"{FOLDER}/home-{number}"
        if number < 0:
            command = "echo 'ERROR: [/usr/bin/ssh] exited with return code [255].' >&2; exit 255"
            home = FOLDER
        environment = os.environ | {
            "HOME": home,
            "FAKE_WORKER": str(number),
            "SPVIT_MOUNTS": f"{home}/mounts",
            "PATH": f"{FOLDER}/worker-bin:/usr/bin:/bin",
        }
        process = os.fork()
        if not process:
            # ssh starts in the home folder; scp's source is relative to where gcloud is called.
            if not command.startswith("cp "):
                os.chdir(home)
            os.execve("/bin/bash", ["bash", "-c", command], environment)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
