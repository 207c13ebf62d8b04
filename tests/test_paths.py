"""Paths in buckets, against a server of the protocol: what may be given, and what is written."""

import contextlib
import http.server
import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spvit_jax import atomic, paths
from spvit_jax.append_only import AppendOnlyFile
from spvit_jax.data.folders import FolderSource
from spvit_jax.data.token_labels import store
from spvit_jax.errors import InputError
from spvit_jax.interop import files
from spvit_jax.models import model_config
from spvit_jax.training import checkpoint
from spvit_jax.training.tensorboard import EventFile
from tests.helpers.bucket import answered_by, serving


@pytest.fixture(scope="module")
def bucket():
    with serving("paths") as bucket:
        yield bucket


@pytest.fixture
def folder(bucket, request):
    """A folder of the bucket for one test."""
    return bucket / request.node.name.replace("[", "-").replace("]", "")


@pytest.mark.parametrize(
    "text",
    [
        *("s3://b/x", "az://b/x", "hdfs://x", "hdfs:x", "http://x/y", "file:///x", "file:x"),
        *("gs:/b/x", "gs:b/x", "GS://b/x", "gs://", "gs:///x", "/gs/b/x", "runs/s3://x"),
    ],
)
def test_other_schemes_are_refused(text):
    with pytest.raises(InputError, match="expected") as error:
        paths.parse(text)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["runs/a", "/gsx/a", "./gs:/x", "a:b", "~/x", "C"])
def test_paths_of_this_machine_are_taken_as_they_are(text):
    assert not paths.is_remote(paths.parse(text))
    assert str(paths.parse(text)) == text.replace("./", "").replace("//", "/")


def test_a_bucket_that_is_not_there(bucket):
    assert str(paths.parse(f"{bucket}/a/b")) == "gs://paths/a/b"
    with pytest.raises(InputError, match=r"^there is no bucket gs://nowhere;"):
        paths.parse("gs://nowhere/a")


@pytest.fixture
def refusing():
    """A server that knows nobody, as Cloud Storage answers them."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code = 401 if "/private/" in self.path else 403
            body = json.dumps({"error": {"code": code, "message": "You\ndo not have access"}})
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    with answered_by(server.server_port):
        yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["private", "closed"])
def test_without_permission_it_is_one_line(refusing, name, capfd):
    with pytest.raises(InputError, match=r"cannot be read: .*; expected credentials") as error:
        paths.parse(f"gs://{name}/a")
    assert "\n" not in str(error.value)


def test_a_bucket_that_does_not_answer_in_time(monkeypatch):
    monkeypatch.setattr(paths, "_TIMEOUT", 0.5)
    with answered_by(9), pytest.raises(InputError, match=r"^gs://far does not answer"):
        paths.parse("gs://far/a")


def test_a_file_is_replaced_whole_or_not_at_all(folder):
    path = folder / "a.txt"
    atomic.write_text(path, "old")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with contextlib.suppress(KeyboardInterrupt), atomic.replacing(path) as temporary:
        temporary.write_text("half of the new")
        signal.raise_signal(signal.SIGINT)
    assert path.read_text() == "old"
    atomic.write_text(path, "new")
    assert path.read_text() == "new"
    assert paths.files_below(folder) == ["a.txt"]


def test_a_folder_that_is_not_finished_is_removed(folder):
    with contextlib.suppress(KeyboardInterrupt), atomic.making_folder(folder) as made:
        (made / "b" / "a").write_text("half")
        assert folder.exists()
        raise KeyboardInterrupt
    assert not folder.exists()


def test_what_marks_a_folder_as_complete_is_written_last(folder, tmp_path, monkeypatch):
    for name in ("a", "features.json", "dataset_info.json", "z"):
        (tmp_path / name).write_text(name)
    put, order = paths.put, []
    monkeypatch.setattr(
        paths, "put", lambda source, to, **k: (order.append(source.name), put(source, to, **k))
    )
    paths.put_folder(tmp_path, folder, last=("features.json", "dataset_info.json"))
    (tmp_path / "a").write_text("what another process makes in the meantime")
    (tmp_path / "b").write_text("b")
    paths.put_folder(tmp_path, folder, last=("features.json", "dataset_info.json"))
    assert order[:4] == ["a", "z", "features.json", "dataset_info.json"]
    # What is there stays, since somebody may be reading it.
    assert {name: (folder / name).read_text() for name in order} == {name: name for name in order}
    assert "b" in order


def test_a_file_that_grows_in_a_bucket(folder, monkeypatch):
    """It is written at most once a minute, and at a flush; another process goes on from there."""
    put, sizes, now = paths.put_bytes, [], [0.0]
    monkeypatch.setattr(
        paths, "put_bytes", lambda data, to: (sizes.append(len(data)), put(data, to))
    )
    file = AppendOnlyFile(folder / "log", clock=lambda: now[0])
    for _ in range(100):
        file.write(b"line\n")
    assert sizes == []
    now[0] = 61.0
    file.write(b"line\n")
    file.write(b"last\n")
    assert sizes == [505]
    assert file.path.read_bytes() == b"line\n" * 101
    file.flush()
    file.flush()
    assert sizes == [505, 510]
    other = AppendOnlyFile(folder / "log")
    other.write(b"more\n")
    other.flush()
    assert file.path.read_bytes() == b"line\n" * 101 + b"last\nmore\n"


def test_a_bucket_that_is_away_for_a_while_loses_nothing(folder, monkeypatch):
    now, put = [0.0], paths.put_bytes

    def refuse(data, to):
        raise OSError("away")

    file = AppendOnlyFile(folder / "log", clock=lambda: now[0])
    monkeypatch.setattr(paths, "put_bytes", refuse)
    now[0] = 61.0
    file.write(b"one\n")  # tries, and keeps it
    with pytest.raises(OSError, match="away"):
        file.flush()
    monkeypatch.setattr(paths, "put_bytes", put)
    file.write(b"two\n")
    file.flush()
    assert file.path.read_bytes() == b"one\ntwo\n"


def test_a_file_that_grows_on_a_disk_is_closed_after_each_write(tmp_path):
    """On a mount of gcsfuse it is in the bucket only then."""
    file = AppendOnlyFile(epath.Path(tmp_path / "log"))
    file.write(b"one\n")
    opened = {path.resolve() for path in epath.Path("/proc/self/fd").iterdir()}
    assert (tmp_path / "log") not in opened
    file.write(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_tensorboard_reads_the_events(where, folder, tmp_path):
    target = folder if where == "bucket" else epath.Path(tmp_path)
    events = EventFile(target)
    events.write_scalars(7, {"train/loss": 0.5, "train/top1": 0.25})
    events.write_scalars(14, {"train/loss": 0.125})
    events.flush()
    (path,) = target.glob("events.out.tfevents.*")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(7, 0.5), (14, 0.125)]
    assert [(e.step, e.value) for e in found.Scalars("train/top1")] == [(7, 0.25)]


def upload(source, target):
    paths.put_folder(source, target, last=())


def test_a_folder_of_images_is_the_same_in_a_bucket(folder, tmp_path):
    rng = np.random.default_rng(0)
    # In the order of names, a folder's images come before those of files named like it.
    for name in ("b/2.png", "b/10.png", "a/x.png", "a/x/1.png", "a/[1]*.png", "a/.hidden.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "c" / "d").write_text("no image")
    upload(tmp_path, folder)
    ours, theirs = FolderSource(folder, "train"), FolderSource(epath.Path(tmp_path), "train")
    assert ours.class_names == theirs.class_names == ("a", "b")
    indices = np.array([3, 0, 4, 3, 1, 2])
    assert ours.file_names(indices) == theirs.file_names(indices)
    assert len(ours) == len(theirs) == 5
    for got, expected in zip(ours.fetch(indices), theirs.fetch(indices), strict=True):
        assert list(got) == list(expected)
    with pytest.raises(InputError, match="is not a folder"):
        FolderSource(folder, "test")


def test_label_maps_are_the_same_in_a_bucket(folder, tmp_path):
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 3, 4, 5)).astype("<f2") for _ in range(6)]
    maps[2] = None
    names = tuple("abcdefg")
    for target in (folder / "maps.npy", epath.Path(tmp_path / "maps.npy")):
        store.write(target, maps, count=6, num_classes=7, source="a test", class_names=names)
    ours, theirs = store.LabelMaps(folder / "maps.npy"), store.LabelMaps(tmp_path / "maps.npy")
    assert (ours.shape, len(ours), ours.missing) == (theirs.shape, 6, 1)
    indices, labels = np.array([5, 2, 0, 5]), np.array([1, 2, 3, 1])
    np.testing.assert_array_equal(ours.fetch(indices, labels), theirs.fetch(indices, labels))
    (folder / "cut.npy").write_bytes((tmp_path / "maps.npy").read_bytes()[:-1])
    (folder / "cut.json").write_bytes((tmp_path / "maps.json").read_bytes())
    with pytest.raises(InputError, match="it is cut off"):
        store.LabelMaps(folder / "cut.npy")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_of_weights_are_read_and_written(suffix, folder):
    path = folder / f"weights.{suffix}"
    files.write(path, {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"name": "x"})
    contents = files.read(path)
    assert contents.note == {"name": "x"}
    np.testing.assert_array_equal(contents.state_dict["a.weight"], [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(
        InputError, match=rf"^cannot read {folder}/none\.{suffix}: No such object or"
    ):
        files.read(folder / f"none.{suffix}")


def test_half_a_checkpoint_is_none_and_a_damaged_one_is_moved_aside(folder, log):
    def open_checkpoints():
        model = model_config("deit_ti")
        return checkpoint.Checkpoints(folder, model, (), keep_last=3, keep_best=1)

    states = {step: {"model": jnp.full((3,), float(step))} for step in (1, 2, 3)}
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), states[1]
    )
    assert checkpoint.newest(folder) is None
    with open_checkpoints() as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    steps = folder / "checkpoints"
    (steps / "3" / "commit_success.txt").unlink()  # it has its name from the start
    assert checkpoint.newest(folder) == 2
    for path in (steps / "2" / "default" / "d").iterdir():
        path.unlink()
    with open_checkpoints() as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(abstract)["model"], [1, 1, 1])
        assert checkpoint.newest(folder) == 1
        for step in (2, 3):
            checkpoints.save(step, states[step])
    with open_checkpoints() as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(abstract)["model"], [3, 3, 3])
    assert (folder / "corrupt-checkpoints" / "2" / "commit_success.txt").exists()
