"""Acts as training on a worker: reports the cluster, counts steps, ends as told.

`plan` beside the fake gcloud's state has, under "behaviour", what differs from `DEFAULT`: a
list with one entry per attempt (the last also for all later ones) of worker's number → settings.
"""

import os
import signal
import sys
import time

DEFAULT = {
    "exit": 0,
    "steps": 4,
    "hang": False,  # at the end, until there is a file `release`
    "report": True,
    "version": None,
    "devices": 4,
    "deaf": False,  # to SIGTERM
    "vanish": False,  # at the end, without an exit code, as with its machine
}


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def main():
    folder, worker = os.environ["FAKE_GCLOUD"], os.environ["FAKE_WORKER"]
    plan = eval(read(f"{folder}/plan"))
    starts = f"{folder}/starts-{worker}"
    number = len(read(starts))
    with open(starts, "a") as file:
        file.write("x")
    with open(f"{folder}/arguments-{worker}", "w") as file:
        file.write(repr(sys.argv[1:]))
    behaviour = plan.get("behaviour") or [{}]
    settings = DEFAULT | behaviour[min(number, len(behaviour) - 1)].get(worker, {})

    def save(*_):
        print("saved")
        sys.exit(75)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if settings["deaf"] else save)
    if settings["report"]:
        version = settings["version"] or read("VERSION").strip()
        print(
            f"2026-11-22 01:02:03 cluster         process {worker} of {plan['workers']}, "
            f"code {version}, {settings['devices']} of {4 * plan['workers']} devices",
            file=sys.stderr,
        )
    done = f"{os.environ['SPVIT_MOUNTS']}/bucket/step-{worker}"
    step = int(read(done) or 0)
    print(f"start at step {step}")
    while step < settings["steps"]:
        time.sleep(0.05)
        step += 1
        with open(done, "w") as file:
            file.write(str(step))
        print(f"step {step}")
    while settings["hang"] and not os.path.exists(f"{folder}/release"):
        time.sleep(0.05)
    if settings["vanish"]:
        os.killpg(0, signal.SIGKILL)
    if settings["exit"]:
        print(f"error: this is why it ends with {settings['exit']}", file=sys.stderr)
    sys.exit(settings["exit"])


main()
