"""Files of records: TFDS's TFRecord made readable at random, and what is wrong with files seen."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow_datasets as tfds

from spvit_jax import paths
from spvit_jax.data import datasets, prepare, records
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError
from tests.helpers import archives
from tests.helpers.bucket import serving

SHARDS = 3


def tfds_default(manual_dir, data_dir):
    """Has TFDS's own builder prepare ImageNet's archives as it does unless told otherwise."""
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=SHARDS)
    builder.download_and_prepare(download_config=config)
    return data_dir


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tfds_default(
        archives.make(tmp_path_factory.mktemp("archives")), tmp_path_factory.mktemp("tfrecord")
    )


@pytest.fixture
def data_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def folder(data_dir):
    return data_dir / "imagenet2012" / "5.1.0"


def convert(data_dir):
    return prepare.prepare("imagenet2012", None, data_dir, partial=True)


def read_by_tfds(data_dir, split):
    """Names, labels and encoded images in TFDS's order, from its own reader of TFRecord files."""
    dataset = tfds.builder("imagenet2012", data_dir=data_dir).as_dataset(
        split=split,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    found = list(dataset.as_numpy_iterator())
    return (
        [example["file_name"].decode() for example in found],
        [int(example["label"]) for example in found],
        [example["image"] for example in found],
    )


def test_what_tfds_prepared_is_converted_record_by_record(original, data_dir):
    with pytest.raises(InputError) as refused:
        datasets.load("imagenet2012", "train", str(data_dir))
    command = f"python -m spvit_jax.data.prepare --dataset=imagenet2012 --data_dir={data_dir}"
    assert "is in tfrecord files" in str(refused.value)
    assert str(refused.value).endswith(command)

    convert(data_dir)
    for split, size in (("train", 32), ("validation", 12)):
        source = datasets.load("imagenet2012", split, str(data_dir))
        images, labels = source.fetch(np.arange(size))
        names = source.file_names(np.arange(size))
        assert (names, labels.tolist(), images) == read_by_tfds(original, split)
        assert read_by_tfds(data_dir, split) == read_by_tfds(original, split)
    sizes = [path.stat().st_size for path in folder(data_dir).glob("*-train.array_record*")]
    assert f"{SHARDS} files, {sum(sizes)} bytes" in prepare.describe("imagenet2012", data_dir)


def test_tfrecords_in_a_bucket_are_converted_there(original):
    with serving("records") as bucket:
        paths.put_folder(original, bucket, last=())
        convert(bucket)
        source = datasets.load("imagenet2012", "train", str(bucket))
        images, labels = source.fetch(np.arange(32))
        names = source.file_names(np.arange(32))
        assert (names, labels.tolist(), images) == read_by_tfds(original, "train")
        # Complete files are not made again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "write", lambda *_: 1 / 0)
            convert(bucket)


def test_after_an_interruption_it_goes_on(data_dir, monkeypatch):
    write = records.write

    def write_until(path, examples):
        if "train" in path.name and "00001" in path.name:
            path.with_name(f".{path.name}.partial").write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(path, examples)

    monkeypatch.setattr(records, "write", write_until)
    with pytest.raises(KeyboardInterrupt):
        convert(data_dir)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"spvit_jax\.data\.prepare"):
        datasets.load("imagenet2012", "train", str(data_dir))
    finished = {p: p.stat().st_mtime_ns for p in folder(data_dir).glob("imagenet*array*")}
    assert len(finished) == SHARDS + 1

    convert(data_dir)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert len(datasets.load("imagenet2012", "train", str(data_dir))) == 32
    assert not list(folder(data_dir).glob(".*"))

    # What is cut off later is converted again, and what is whole is left alone.
    first, *_, last = sorted(folder(data_dir).glob("*-train.array_record*"))
    written = first.stat().st_mtime_ns
    os.truncate(last, 70_000)
    with pytest.raises(InputError, match=f"{last.name} is cut off or damaged"):
        datasets.load("imagenet2012", "train", str(data_dir))
    convert(data_dir)
    assert first.stat().st_mtime_ns == written
    assert len(datasets.load("imagenet2012", "train", str(data_dir))) == 32


def test_data_that_may_not_be_written_is_converted_beside_links(original, tmp_path):
    """As the README says: a folder of links is prepared in its place."""
    (tmp_path / "links").mkdir()
    subprocess.run(["cp", "-rs", original / "imagenet2012", tmp_path / "links"], check=True)
    convert(tmp_path / "links")
    assert len(datasets.load("imagenet2012", "train", str(tmp_path / "links"))) == 32
    assert not list(folder(original).glob("*.array_record*"))
    assert "alternative" not in (folder(original) / "dataset_info.json").read_text()


@pytest.mark.parametrize("names", [range(3, 15), [*range(1, 12), 20]])
def test_labels_that_tfds_took_by_position_are_refused(names, tmp_path):
    manual_dir = archives.make(
        tmp_path / "archives", classes=(), validation=archives.validation_names(names)
    )
    (manual_dir / "ILSVRC2012_img_train.tar").unlink()
    data_dir = tfds_default(manual_dir, tmp_path / "data")
    with pytest.raises(InputError, match=r"has the label n\d+ for 'ILSVRC.*; expected n\d+: TFDS"):
        convert(data_dir)


def damage(path):
    """Changes a byte in the middle, which the checksum of a record knows."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def without_a_record(path):
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records[1:]:
            writer.write(record)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: os.truncate(path, 5000), "cannot be read to its end"),
        (damage, "cannot be read to its end"),
        (without_a_record, "holds 9 records; expected 10"),
    ],
)
def test_a_tfrecord_file_that_is_not_whole(harm, words, data_dir):
    path = folder(data_dir) / f"imagenet2012-train.tfrecord-00001-of-{SHARDS:05}"
    harm(path)
    with pytest.raises(InputError, match=rf"{path.name} {words}"):
        convert(data_dir)
    assert not list(folder(data_dir).glob(".*"))


def without_some(path):
    """Replaces a file by another that is whole, with fewer records."""
    other = min(path.parent.glob("*-train.array_record*"), key=lambda p: (p == path, p.name))
    shutil.copy(other, path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: os.truncate(path, 0), "is cut off or damaged"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is cut off or damaged"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "is cut off or damaged"),
        (without_some, "holds 11 records; expected 10"),
    ],
)
def test_a_file_of_records_that_is_not_whole_is_seen_when_it_is_opened(harm, words, data_dir):
    convert(data_dir)
    path = folder(data_dir) / f"imagenet2012-train.array_record-00001-of-{SHARDS:05}"
    harm(path)
    with pytest.raises(InputError, match=rf"{path.name} {words}"):
        datasets.load("imagenet2012", "train", str(data_dir))
    assert len(datasets.load("imagenet2012", "validation", str(data_dir))) == 12
    assert len(datasets.load("imagenet2012", "train[:11]", str(data_dir))) == 11


def test_another_format_is_not_converted(data_dir):
    path = folder(data_dir) / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "riegeli"}))
    with pytest.raises(InputError, match="holds riegeli files; expected tfrecord"):
        convert(data_dir)


def test_a_data_set_without_images_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("asked")
    )
    for open_it in (
        lambda: datasets.load("imdb_reviews", "train", str(tmp_path)),
        lambda: prepare.prepare("imdb_reviews", None, tmp_path),
    ):
        with pytest.raises(InputError, match="has the features label, text; expected 'image'"):
            open_it()
