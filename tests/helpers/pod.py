"""A pod of pretence: a small checkout with the real `launch/`, and a fake gcloud on the PATH."""

import ast
import os
import shutil
import subprocess
import sys
import time

from tests.helpers import REPOSITORY

SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "NAME": "spvit-test",
    "ACCELERATOR": "v4:2x2x3",  # three VMs
    "PROVISIONING": "spot",
    "BUCKET": "my-bucket",
}
# What Google's machines have, as far as worker.sh asks for it.
ON_WORKERS = {
    "curl": 'echo "$FAKE_WORKER"',
    "sudo": 'exec "$@"',
    "mountpoint": 'test -L "${@: -1}"',
    "gcsfuse": 'echo "$*" >>"$HOME/gcsfuse.log" && rmdir "${@: -1}" && '
    'ln -s "../../${@: -2:1}" "${@: -1}"',
    "fusermount": 'rm "$2"',
    # Makes an "environment" whose python notes what is installed.
    "python3.13": 'mkdir -p "$3/bin" && cp "$FAKE_GCLOUD/worker-bin/python" "$3/bin/python"',
    "python": f'if [[ "$1 $2" == "-m pip" ]]; then echo "$@" >>"$HOME/pip.log"; '
    f'else exec {sys.executable} -I -S -u "$@"; fi',
}


COMMAND = ("run", "python", "train.py")
PLACE = "--name=spvit-test --zone=us-west4-a --project=my-project"
DELETE = f"launch/tpu_pod.sh {PLACE} delete"


class Pod:
    """Runs tpu_pod.sh, and knows what it called.

    Attributes:
      folder: of the fake gcloud.
      checkout: a repository of git with the code that the workers get.
    """

    def __init__(self, path, ready=None):
        self.path, self._ready = path, ready
        self.folder, self.checkout = path / "fake", path / "checkout"
        self.environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "FAKE_GCLOUD": str(self.folder),
            "TPU_POD_BACKOFF": "0",
            "TPU_POD_POLL": "0.1",
            "TPU_POD_RETRIES": "3",
            "TPU_POD_REPORT_TIMEOUT": "20",
            "TPU_POD_EXIT_GRACE": "20",
        }

    def copy(self, template):
        shutil.copytree(template, self.path, symlinks=True, dirs_exist_ok=True)
        return self

    def ready(self):
        """Goes on as if `create` and `sync` had been called."""
        return self.copy(self._ready)

    def make(self):
        """Makes what all tests begin with."""
        for folder in ("my-bucket", "my-data", "worker-bin", "bin"):
            (self.folder / folder).mkdir(parents=True)
        fake = (REPOSITORY / "tests/helpers/fake_gcloud.py").read_text()
        script(self.folder / "bin/gcloud", fake, f"{sys.executable} -IS")
        for name, text in ON_WORKERS.items():
            script(self.folder / "worker-bin" / name, text)
        shutil.copytree(REPOSITORY / "launch", self.checkout / "launch")
        shutil.copy(REPOSITORY / "tests/helpers/fake_worker.py", self.checkout / "train.py")
        (self.checkout / "requirements-tpu.txt").write_text("libtpu\n")
        (self.checkout / ".gitignore").write_text("runs/\nlaunch/pod.env\n")
        self.git("init", "--quiet")
        self.commit()
        self.plan()
        self.settings()

    def git(self, *args):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ("git", *identity, *args)
        result = subprocess.run(command, cwd=self.checkout, check=True, capture_output=True)
        return result.stdout.decode().strip()

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=x")
        return self.version

    @property
    def version(self):
        return self.git("rev-parse", "--short", "HEAD")

    def plan(self, **plan):
        """Says what will happen; see PLAN of the fake gcloud, and DEFAULT of the fake worker."""
        (self.folder / "plan").write_text(repr({"workers": 3} | plan))

    def settings(self, **changed):
        lines = [f"{key}={value}\n" for key, value in (SETTINGS | changed).items()]
        (self.checkout / "launch/pod.env").write_text("# a comment\n\n" + "".join(lines))

    def start(self, *args, **environment):
        # What nohup or a background shell has its children ignore, a script could not trap.
        heeding = ["env", "--default-signal=INT,HUP"]
        return subprocess.Popen(
            [*heeding, "bash", "launch/tpu_pod.sh", *args],
            cwd=self.checkout,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args, code=0, **environment):
        """Runs a verb to its end, which must have this exit code; returns what it said."""
        calls = len(self.calls())
        process = self.start(*args, **environment)
        said = self.outcome(process, code)
        if args[0] in ("create", "run", "stop") and len(self.calls()) > calls:
            self.check_that_the_rest_is_named(said)
        return said

    def outcome(self, process, code):
        """Waits for a verb's end, which must have this exit code; returns what it said."""
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        return stdout + stderr

    def check_that_the_rest_is_named(self, said):
        """Checks that what is left, and may cost money, is said, with what deletes it."""
        left = self.state() != (None, None)
        assert (DELETE in said) == left, said
        assert self.record().exists() >= left

    def record(self):
        """The file that says that the pod has been asked for and not been seen gone since."""
        return self.checkout / "runs/pods/created/my-project,us-west4-a,spvit-test"

    def calls(self, *words):
        """The calls, without `compute tpus`, that contain all words."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [" ".join(ast.literal_eval(line)[2:]) for line in lines]
        return [call for call in calls if all(word in call for word in words)]

    def state(self):
        state = {"resource": None, "node": None} | self.facts()
        return tuple(state[what] and state[what][0] for what in ("resource", "node"))

    def facts(self):
        """What the fake gcloud knows of the pod."""
        path = self.folder / "state"
        return ast.literal_eval(path.read_text()) if path.exists() else {}

    def starts(self):
        """How often the command has been started on each worker."""
        paths = (self.folder / f"starts-{n}" for n in range(3))
        return [len(path.read_text()) if path.exists() else 0 for path in paths]

    def steps(self):
        """The steps that the workers have done, as they keep them in the bucket."""
        paths = (self.folder / f"my-bucket/step-{n}" for n in range(3))
        return [int(path.read_text() or 0) if path.exists() else 0 for path in paths]

    def log(self, worker):
        """The last attempt's log of a worker, as kept on this machine."""
        *_, last = sorted((self.checkout / "runs/pods/spvit-test").glob("*/"))
        return (last / f"worker-{worker}.log").read_text()

    def alive(self):
        """The processes that still run the fake worker."""
        pids = [path.read_text().strip() for path in self.folder.glob("*/spvit_jax_run/child")]
        return [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")]

    def wait_for(self, condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self):
        """Leaves no process behind, whatever a test did."""
        for pid in self.alive():
            os.kill(int(pid), 9)


def script(path, text, shell="/bin/bash"):
    path.write_text(f"#!{shell}\n{text}\n")
    path.chmod(0o755)


def verbs(calls):
    """The first two words of each call, repetitions in a row counted once."""
    verbs = [" ".join(call.split()[:2]) for call in calls]
    return [verb for verb, before in zip(verbs, [None, *verbs], strict=False) if verb != before]
