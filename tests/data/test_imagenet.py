"""ImageNet's archives become TFDS's data set: complete, resumed, or refused with a reason."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from spvit_jax import paths
from spvit_jax.data import datasets, imagenet, prepare
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError
from tests.helpers import REPOSITORY, archives
from tests.helpers.bucket import serving
from tests.helpers.commands import run

SHARDS = 5


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
    return archives.make(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="module")
def prepared(manual_dir, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    imagenet.prepare(manual_dir, data_dir, partial=True, num_shards=SHARDS)
    return data_dir


@pytest.fixture(scope="module")
def stock(manual_dir, tmp_path_factory):
    """What TFDS's builder makes of the same archives."""
    data_dir = tmp_path_factory.mktemp("stock")
    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=SHARDS)
    )
    return data_dir


def folder(data_dir):
    return data_dir / "imagenet2012" / "5.1.0"


def records(data_dir):
    """The records of each file in their order; how a record lists its fields is not fixed."""
    features = tfds.builder("imagenet2012", data_dir=data_dir).info.features
    decoders = {"image": tfds.decode.SkipDecoding()}

    def read(path):
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:
            return [
                features.deserialize_example_np(record, decoders=decoders)
                for record in reader.read_all()
            ]

    return {path.name: read(path) for path in sorted(folder(data_dir).glob("*array_record*"))}


def test_from_a_bucket_into_a_bucket(manual_dir, prepared, tmp_path):
    """The archives are read there and the same files written; interrupted, the command goes on."""
    with serving("imagenet") as bucket:
        paths.put_folder(manual_dir, bucket / "archives", last=())
        data_dir = bucket / "data"

        def make():
            imagenet.prepare(bucket / "archives", data_dir, partial=True, num_shards=SHARDS)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "move_folder", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make()
        assert not folder(data_dir).exists()
        make()
        written = {name: (folder(data_dir) / name).read_bytes() for name in files_of(data_dir)}
        assert paths.files_below(data_dir) == [f"imagenet2012/5.1.0/{name}" for name in written]
        ours = datasets.load("imagenet2012", "train", str(data_dir))
        theirs = datasets.load("imagenet2012", "train", str(prepared))
        indices = np.array([0, 31, 7])
        assert ours.file_names(indices) == theirs.file_names(indices)
        assert ours.fetch(indices)[0] == theirs.fetch(indices)[0]
        np.testing.assert_array_equal(ours.labels(), theirs.labels())
    assert sorted(written) == sorted(path.name for path in folder(prepared).iterdir())


def files_of(data_dir):
    return sorted(path.name for path in folder(data_dir).iterdir())


def test_what_is_made_is_what_tfds_makes(prepared, stock):
    """File by file and record by record, the CMYK and PNG files included."""
    assert len(records(prepared)) == 2 * SHARDS
    assert records(prepared) == records(stock)
    for name in ("features.json", "label.labels.txt"):
        assert (folder(prepared) / name).read_text() == (folder(stock) / name).read_text()
    infos = [json.loads((folder(d) / "dataset_info.json").read_text()) for d in (prepared, stock)]
    assert infos[0]["fileFormat"] == infos[1]["fileFormat"] == "array_record"
    lengths = [{s["name"]: s["shardLengths"] for s in info["splits"]} for info in infos]
    assert lengths[0] == lengths[1]


def test_what_is_read(prepared, manual_dir):
    source = datasets.load("imagenet2012", "train", str(prepared))
    assert (len(source), source.num_classes) == (32, 1000)
    names, (images, labels) = source.file_names(np.arange(32)), source.fetch(np.arange(32))
    np.testing.assert_array_equal(source.labels(), labels)
    wnids = tfds.builder("imagenet2012", data_dir=prepared).info.features["label"].int2str
    assert [name.split("_")[0] for name in names] == [wnids(label) for label in labels.tolist()]
    for name, image in zip(names, images, strict=True):
        assert tf.io.is_jpeg(image)
        assert tf.io.decode_jpeg(image).shape[-1] == 3, name
    assert archives.CMYK in names
    assert archives.PNG in names
    held_out = datasets.load("imagenet2012", "validation", str(prepared))
    assert len(held_out) == 12


def test_validation_labels_are_those_of_the_list(prepared):
    source = datasets.load("imagenet2012", "validation", str(prepared))
    listed = pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012/validation_labels.txt"
    wnids = listed.read_text().split()
    names = pathlib.Path(listed.with_name("labels.txt")).read_text().split()
    files = source.file_names(np.arange(12))
    expected = [names.index(wnids[int(name[-13:-5]) - 1]) for name in files]
    assert source.labels().tolist() == expected


@pytest.mark.parametrize("split", ["train[:25%]", "train[10:20]+validation", "validation"])
def test_labels_of_slices_are_those_of_their_records(split, prepared, stock):
    """From the file that preparing writes, and from one that is made when it is first needed."""
    for data_dir in (prepared, stock):
        source = datasets.load("imagenet2012", split, str(data_dir))
        np.testing.assert_array_equal(source.labels(), source.fetch(np.arange(len(source)))[1])


def test_after_an_interruption_it_goes_on(manual_dir, prepared, tmp_path):
    """What is finished is not written again, and a half-written file is."""
    script = f"""
import os, pathlib
from spvit_jax.data import imagenet
write = imagenet._write_shard
def write_until(builder, archive, images, path):
    if "00003" in path.name:
        path.with_name("." + path.name + ".partial").write_bytes(b"half of it")
        os.kill(os.getpid(), 9)
    write(builder, archive, images, path)
imagenet._write_shard = write_until
root = pathlib.Path({str(tmp_path)!r})
imagenet.prepare(pathlib.Path({str(manual_dir)!r}), root, partial=True, num_shards={SHARDS})
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    (unfinished,) = folder(tmp_path).parent.glob("5.1.0.unfinished-*")
    finished = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("imagenet*")}
    assert len(finished) == 3
    with pytest.raises(InputError, match=r"python -m spvit_jax\.data\.prepare"):
        datasets.load("imagenet2012", "train", str(tmp_path))

    imagenet.prepare(manual_dir, tmp_path, partial=True, num_shards=SHARDS)
    assert records(tmp_path) == records(prepared)
    assert not unfinished.exists()
    for name, modified in finished.items():
        assert (folder(tmp_path) / name).stat().st_mtime_ns == modified


def test_what_was_begun_with_other_archives_is_left_alone(
    manual_dir, prepared, tmp_path, monkeypatch
):
    """A part of ImageNet was tried first, and never finished."""
    other = archives.make(tmp_path / "other", per_class=5)
    write = imagenet._write_split

    def write_until(builder, manual_dir, directory, split, *args):
        if split == "validation":
            raise KeyboardInterrupt
        return write(builder, manual_dir, directory, split, *args)

    monkeypatch.setattr(imagenet, "_write_split", write_until)
    with pytest.raises(KeyboardInterrupt):
        imagenet.prepare(other, tmp_path, partial=True, num_shards=SHARDS)
    monkeypatch.undo()
    imagenet.prepare(manual_dir, tmp_path, partial=True, num_shards=SHARDS)
    assert records(tmp_path) == records(prepared)


def test_a_full_disk_keeps_what_is_finished(manual_dir, prepared, tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    script = f"""
import pathlib, resource
from spvit_jax.data import imagenet
from spvit_jax.errors import InputError
write = imagenet._write_shard
def write_until(builder, archive, images, path):
    if "00002" in path.name:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    write(builder, archive, images, path)
imagenet._write_shard = write_until
root = pathlib.Path({str(tmp_path)!r})
try:
    imagenet.prepare(pathlib.Path({str(manual_dir)!r}), root, partial=True, num_shards={SHARDS})
except InputError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "the same command goes on" in result.stdout, result.stderr
    assert len(list(folder(tmp_path).parent.rglob("*array_record*"))) == 2
    imagenet.prepare(manual_dir, tmp_path, partial=True, num_shards=SHARDS)
    assert records(tmp_path) == records(prepared)


def test_a_disk_with_too_little_room_is_noticed_before(manual_dir, tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"its disk has 0\.0 left"):
        imagenet.prepare(manual_dir, tmp_path, partial=True)


def test_archives_that_are_not_imagenets(manual_dir, tmp_path):
    with pytest.raises(InputError, match="expected 147897477120: download it again"):
        imagenet.prepare(manual_dir, tmp_path)
    with pytest.raises(InputError, match="holds neither ILSVRC2012_img_train"):
        imagenet.prepare(tmp_path, tmp_path, partial=True)
    with pytest.raises(InputError, match="is not there; register"):
        imagenet.prepare(tmp_path, tmp_path)

    cut = shutil.copytree(manual_dir, tmp_path / "cut")
    os.truncate(cut / "ILSVRC2012_img_train.tar", 100_000)
    with pytest.raises(InputError, match="cannot be read to its end"):
        imagenet.prepare(cut, tmp_path, partial=True)

    empty = shutil.copytree(manual_dir, tmp_path / "empty")
    os.truncate(empty / "ILSVRC2012_img_val.tar", 0)
    with pytest.raises(InputError, match=r"img_val\.tar cannot be read to its end"):
        imagenet.prepare(empty, tmp_path, partial=True)

    train = shutil.copytree(manual_dir, tmp_path / "other")
    shutil.copy(train / "ILSVRC2012_img_val.tar", train / "ILSVRC2012_img_train.tar")
    with pytest.raises(InputError, match=r"img_train\.tar cannot be read"):
        imagenet.prepare(train, tmp_path, partial=True)


def test_a_file_that_is_there_twice(tmp_path):
    archives.make(tmp_path, classes=("n01440764", "n01440764"))
    with pytest.raises(InputError, match=r"holds 'n01440764_0\.JPEG' 2 times"):
        imagenet.prepare(tmp_path, tmp_path, partial=True)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (archives.validation_names([*range(1, 5), *range(7, 15)]), "00000013"),  # a part
        ([*archives.validation_names(range(1, 12)), "cat.JPEG"], "cat.JPEG"),  # another name
        ([f"./{name}" for name in archives.validation_names(range(1, 13))], r"\./ILSVRC"),
    ],
)
def test_validation_images_that_tfds_would_label_wrong(names, found, tmp_path, monkeypatch):
    """It takes the labels of the first names of its list, in order, for the names that it finds."""
    archives.make(tmp_path, classes=(), validation=names)
    given = imagenet_common.get_validation_labels(tmp_path / "ILSVRC2012_img_val.tar")
    right = imagenet.validation_labels()
    assert any(label != right.get(name) for name, label in given.items())

    words = rf"img_val\.tar holds '\S*{found}\S*'; expected files ILSVRC2012_val_00000001\.JPEG to "
    with pytest.raises(InputError, match=words):
        imagenet.prepare(tmp_path, tmp_path / "data", partial=True)
    labels = real_labels(tmp_path)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: labels)
    with pytest.raises(InputError, match=words):
        prepare.prepare("imagenet2012_real", tmp_path, tmp_path / "data")


def test_a_part_is_not_passed_for_the_whole(manual_dir, prepared, tmp_path, monkeypatch):
    words = r"5\.1\.0 holds a part of ImageNet, 32 train images; expected 1281167: pass --partial"
    for folder_of_archives in (manual_dir, None):
        with pytest.raises(InputError, match=words):
            prepare.prepare("imagenet2012", folder_of_archives, prepared)
    prepare.prepare("imagenet2012", manual_dir, prepared, partial=True)

    only_train = shutil.copytree(manual_dir, tmp_path / "archives")
    (only_train / "ILSVRC2012_img_val.tar").unlink()
    imagenet.prepare(only_train, tmp_path / "data", partial=True)
    whole = dataclasses.replace(imagenet.ARCHIVES["train"], num_images=32)
    monkeypatch.setitem(imagenet.ARCHIVES, "train", whole)
    with pytest.raises(InputError, match=r"0 validation images; expected 50000"):
        prepare.prepare("imagenet2012", None, tmp_path / "data")


def test_what_is_missing_is_said_before_anything_is_read(manual_dir, tmp_path, monkeypatch):
    """An archive that is not there, or a folder, or nowhere to write."""
    monkeypatch.setattr(imagenet, "_contents", lambda *_: pytest.fail("an archive was read"))
    root = shutil.copytree(manual_dir, tmp_path / "archives")
    for split, archive in imagenet.ARCHIVES.items():
        size = (root / archive.file_name).stat().st_size
        whole = dataclasses.replace(archive, num_bytes=size)
        monkeypatch.setitem(imagenet.ARCHIVES, split, whole)
    (tmp_path / "file").write_text("")
    for data_dir in (tmp_path / "file", tmp_path / "file" / "data", pathlib.Path("/proc/data")):
        with pytest.raises(InputError, match=rf"cannot be prepared in {data_dir}: .*a folder that"):
            prepare.prepare("imagenet2012", root, data_dir)
    validation = root / "ILSVRC2012_img_val.tar"
    validation.unlink()
    with pytest.raises(InputError, match=r"img_val\.tar is not there; register"):
        prepare.prepare("imagenet2012", root, tmp_path / "data")
    validation.mkdir()
    for partial in (False, True):
        with pytest.raises(InputError, match=r"img_val\.tar is not a file"):
            prepare.prepare("imagenet2012", root, tmp_path / "data", partial=partial)


@pytest.mark.parametrize("name", [archives.CMYK, archives.PNG])
def test_a_damaged_image_that_is_encoded_anew(name, tmp_path):
    archives.make(tmp_path, replaced={name: b"not an image"})
    words = rf"{name} in {tmp_path}/ILSVRC2012_img_train\.tar cannot be decoded"
    with pytest.raises(InputError, match=words):
        imagenet.prepare(tmp_path, tmp_path / "data", partial=True)
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_a_wrong_number_of_classes_is_refused(manual_dir, tmp_path, monkeypatch):
    """Even where the size is right: here the small archives are taken for the published ones."""
    for split, archive in imagenet.ARCHIVES.items():
        size = (manual_dir / archive.file_name).stat().st_size
        small = imagenet.Archive(archive.file_name, size, 32)
        monkeypatch.setitem(imagenet.ARCHIVES, split, small)
    with pytest.raises(InputError, match="32 images of 4 classes; expected 32 of 1000"):
        imagenet.prepare(manual_dir, tmp_path)


def test_the_command_says_what_it_made(manual_dir, tmp_path, environment):
    args = [f"--manual_dir={manual_dir}", f"--data_dir={tmp_path}", "--partial"]
    result = run(environment, "data.prepare", *args)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["imagenet2012", str(folder(tmp_path))]
    size = sum(path.stat().st_size for path in folder(tmp_path).glob("*-train.array_record*"))
    assert lines[1].split(maxsplit=1) == [
        "train",
        f"32 examples of 1000 classes, 1 files, {size} bytes",
    ]
    image = datasets.load("imagenet2012", "train", str(tmp_path)).fetch(np.array([0]))[0][0]
    shape = "×".join(map(str, tf.io.decode_image(image).shape))
    assert f"the first: {shape} pixels of mean" in lines[2]
    assert run(environment, "data.prepare", *args).stdout == result.stdout  # prepared already


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dataset=imagenet2012"], "needs --manual_dir=DIR"),
        (["--dataset=imagenet2013"], "did you mean 'imagenet2012'"),
        (["--manual_dir=/nowhere"], "--manual_dir=/nowhere is not a folder"),
        (["--dataset=imdb_reviews"], "'imdb_reviews' has the features label, text; expected"),
    ],
)
def test_the_command_started_wrong(args, words, tmp_path, environment):
    args = (*args, f"--data_dir={tmp_path}")
    result = run(environment, "data.prepare", *args, check=False)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def real_labels(tmp_path):
    """Twelve images: none, one, or two right labels; the published file has 50,000."""
    path = tmp_path / "real.json"
    path.write_text(
        json.dumps([[number] * (number > 2) + [999] * (number % 2) for number in range(12)])
    )
    return path


def test_imagenet_real_through_tfds(manual_dir, tmp_path, monkeypatch):
    """Only the download of the labels is replaced."""
    labels = real_labels(tmp_path)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: labels)
    prepare.prepare("imagenet2012_real", manual_dir, tmp_path)
    source = datasets.load("imagenet2012_real", "validation", str(tmp_path))
    assert (len(source), source.num_classes, source.several_labels) == (12, 1000, True)
    names, (_, right) = source.file_names(np.arange(12)), source.fetch(np.arange(12))
    for name, row in zip(names, right, strict=True):
        place = int(name[-13:-5]) - 1
        assert set(np.flatnonzero(row)) == set([place] * (place > 2) + [999] * (place % 2))
    assert "label" in prepare.describe("imagenet2012_real", tmp_path)


def test_imagenet_v2_through_tfds(tmp_path, monkeypatch):
    """Its folders are numbered by class, and its name has a variant in it."""
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    for label in (0, 7, 999):
        (root / str(label)).mkdir(parents=True)
        (root / str(label) / "a.jpeg").write_bytes(archives.photograph(label))
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", lambda self, url: tmp_path
    )
    name = "imagenet_v2/matched-frequency"
    prepare.prepare(name, None, tmp_path / "data")
    source = datasets.load(name, "test", str(tmp_path / "data"))
    assert (len(source), source.num_classes) == (3, 1000)
    assert sorted(source.labels().tolist()) == [0, 7, 999]
    for file_name, label in zip(
        source.file_names(np.arange(3)), source.labels().tolist(), strict=True
    ):
        assert file_name == f"{label}/a.jpeg"
