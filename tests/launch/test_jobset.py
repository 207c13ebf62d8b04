"""The manifest for Kubernetes, the image, and what launch/README.md promises of both."""

import math
import re
import subprocess

import pytest
import yaml

from spvit_jax.errors import START_AGAIN
from tests.helpers import REPOSITORY

LAUNCH = REPOSITORY / "launch"


@pytest.fixture
def manifest():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


@pytest.fixture
def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


# As the Job controller of Kubernetes words why a job has failed.
ENDS = {
    2: ("PodFailurePolicy", "Container worker for pod a/b failed with exit code 2 matching"),
    75: ("PodFailurePolicy", "Container worker for pod a/b failed with exit code 75 matching"),
    "preempted": ("PodFailurePolicy", "Pod a/b has condition DisruptionTarget matching"),
    1: ("BackoffLimitExceeded", "Job has reached the specified backoff limit"),
    137: ("BackoffLimitExceeded", "Job has reached the specified backoff limit"),
}


def failure_of(job, end):
    """Reason and message with which the job fails: the first rule that matches its end."""
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": []})
        conditions = [condition["type"] for condition in rule.get("onPodConditions", [])]
        if end in codes["values"] or (end == "preempted" and "DisruptionTarget" in conditions):
            assert rule["action"] == "FailJob"
            reason, message = ENDS[end]
            return reason, f"{message} FailJob rule at index {index}"
    assert job["backoffLimit"] == 0
    return "BackoffLimitExceeded", ENDS[1][1]


@pytest.mark.parametrize(
    ("end", "action"),
    [
        (2, "FailJobSet"),
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        ("preempted", "RestartJobSetAndIgnoreMaxRestarts"),
        (1, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_what_follows_each_kind_of_end(manifest, job, end, action):
    """JobSet takes the first rule whose reason and pattern match, else RestartJobSet."""
    reason, message = failure_of(job, end)
    assert (reason, message.split(" FailJob rule")[0]) == ENDS[end]
    policy = manifest["spec"]["failurePolicy"]
    matching = [
        rule["action"]
        for rule in policy["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
    ]
    assert [*matching, "RestartJobSet"][0] == action
    assert policy["maxRestarts"] == 3


def test_names_of_the_rules_are_valid(manifest):
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_the_workers_are_those_of_the_slice(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] * chips == math.prod(map(int, shape))
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"  # the index becomes TPU_WORKER_ID
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy demands
    rules = [rule.get("onExitCodes") for rule in job["podFailurePolicy"]["rules"]]
    assert {rule["containerName"] for rule in rules if rule} == {container["name"]}
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert [mount["name"] for mount in container["volumeMounts"]] == volumes
    mounts = {
        mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]
    }
    assert mounts == {"/bucket": False, "/data": True}
    assert "--config.data.data_dir=/data" in container["args"]
    assert "--workdir=/bucket/runs/RUN" in container["args"]


def test_a_node_that_is_lost_never_counts_as_a_failure(manifest, job):
    """Its survivors end with 75, long before the node is given up; then they wait for the next."""
    assert START_AGAIN == 75
    policy = manifest["spec"]["failurePolicy"]
    unlimited = [
        rule["onJobFailureMessagePatterns"]
        for rule in policy["rules"]
        if rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    ]
    assert unlimited == [["exit code 75 "], ["condition DisruptionTarget "]]
    assert policy["restartStrategy"] == "BlockingRecreate"
    (container,) = job["template"]["spec"]["containers"]
    (timeout,) = [arg for arg in container["args"] if arg.startswith("--cluster_timeout=")]
    assert int(timeout.partition("=")[2]) >= 3600


def test_the_table_of_slices_adds_up():
    """Chips of the topology = workers × chips per worker, in each row of the manifest's head."""
    rows = re.findall(
        r"^# +(v\w+):([x\d]+) +(tpu-\S+) +([x\d]+) +(\d+) +(\d+)$",
        (LAUNCH / "jobset.yaml").read_text(),
        flags=re.MULTILINE,
    )
    assert len(rows) == 4
    for _, topology, _, label, workers, chips in rows:
        assert topology == label
        assert math.prod(map(int, topology.split("x"))) == int(workers) * int(chips)


def test_what_has_to_be_replaced_is_said_at_the_head(manifest):
    head, _, body = (LAUNCH / "jobset.yaml").read_text().partition("apiVersion")
    lines = [line.partition("#")[0] for line in body.splitlines()]
    used = {word for line in lines for word in re.findall(r"\b[A-Z]{3,}\b", line)}
    assert used == {"RUN", "IMAGE", "BUCKET", "DATA", "ACCOUNT"}
    for word in used:
        assert re.search(rf"^#   {word} ", head, flags=re.MULTILINE)
    assert f"{manifest['metadata']['name']}" == "RUN"


def test_the_image_is_built_from_what_is_committed(tmp_path):
    """With a `docker` that notes its arguments and keeps the context."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    for name in ("build_image.sh", "Dockerfile"):
        (checkout / "launch" / name).write_bytes((LAUNCH / name).read_bytes())
    (checkout / "a.py").write_text("committed")
    git = ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for args in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=x"]):
        subprocess.run([*git, *args], check=True)
    (checkout / "a.py").write_text("not committed")
    version = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(
        '#!/bin/bash\necho "$1" >>"$KEPT/calls"\n'
        'if [[ $1 == build ]]; then cp -r "${@: -1}" "$KEPT/context"; fi\n'
    )
    docker.chmod(0o755)
    environment = {"PATH": f"{docker.parent}:/usr/bin:/bin", "KEPT": str(tmp_path)}

    def build(*args):
        return subprocess.run(
            ["bash", checkout / "launch/build_image.sh", *args],
            env=environment,
            capture_output=True,
            text=True,
        )

    result = build("eu-docker.pkg.dev/p/images/spvit_jax", "--push")
    assert result.stdout.splitlines()[-1] == f"eu-docker.pkg.dev/p/images/spvit_jax:{version}"
    assert "without your uncommitted changes" in result.stderr
    assert (tmp_path / "calls").read_text().split() == ["build", "push"]
    assert (tmp_path / "context/VERSION").read_text() == version + "\n"
    assert (tmp_path / "context/a.py").read_text() == "committed"
    assert not (tmp_path / "context/.git").exists()
    for args in ((), ("a b",), ("image;id",), ("image", "--pull")):
        result = build(*args)
        assert result.returncode == 2
        assert result.stderr.startswith("error: expected an image's name")


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("**/*.sh")), ids=lambda path: path.name)
def test_bash_can_read_each_script(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_the_dockerfile_takes_what_the_context_has():
    text = (LAUNCH / "Dockerfile").read_text()
    assert text.index("test -s VERSION") > text.index("COPY . .")
    assert 'ENTRYPOINT ["tini", "--"]' in text
    assert re.search(r"^FROM python:3\.11-slim$", text, flags=re.MULTILINE)


def test_the_files_that_the_readme_names_are_there():
    text = (LAUNCH / "README.md").read_text()
    for name in re.findall(r"launch/([\w.]+\.(?:sh|example))", text):
        assert (LAUNCH / name).exists(), name
    for name in re.findall(r"\]\((?!https|#)([^)]+)\)", text):
        assert (LAUNCH / name).exists(), name
    help_text = subprocess.check_output(["bash", LAUNCH / "tpu_pod.sh", "--help"], text=True)
    for verb in set(re.findall(r"tpu_pod\.sh ([a-z]+)", text)):
        assert re.search(rf"^  {verb}\b", help_text, flags=re.MULTILINE), verb
