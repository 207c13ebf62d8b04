"""What is logged reaches the standard error and the log of a run, once."""

import logging

import pytest

from spvit_jax import distributed, logs
from spvit_jax.errors import InputError


def lines(text):
    """Without the time at the beginning of each."""
    return [line.split(" ", 2)[2] for line in text.splitlines()]


def test_warnings_are_shown_though_the_root_logger_is_mute(capfd, tmp_path, monkeypatch):
    """As absl makes it; and training's log begins with those from before there was a workdir."""
    monkeypatch.setattr(logging.getLogger(), "level", logging.CRITICAL)
    logs.start()
    logs.log.warning("warning: of weights")
    logging.getLogger("spvit_jax.data").warning("unreadable a.png")
    logs.log.info("not a warning")
    assert lines(capfd.readouterr().err) == ["warning: of weights", "unreadable a.png"]
    logs.start_run(tmp_path)
    logs.log.info("start")
    logging.getLogger("spvit_jax.data").warning("unreadable b.png")
    assert lines(capfd.readouterr().err) == ["start", "unreadable b.png"]
    expected = ["warning: of weights", "unreadable a.png", "start", "unreadable b.png"]
    assert lines((tmp_path / "train.log").read_text()) == expected


def test_what_all_processes_know_is_said_by_the_first(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    for begin in (logs.start, lambda: logs.start_run(tmp_path)):
        begin()
        logs.log.info("start")
        logs.log.warning("warning: of weights")
        logging.getLogger("spvit_jax.data").warning("unreadable a.png")
        assert lines(capfd.readouterr().err) == ["unreadable a.png"]
    assert not (tmp_path / "train.log").exists()


def test_a_log_on_a_full_disk_is_given_up_in_one_line(capfd, tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    logs.start_run(tmp_path)
    logs.log.info("start")
    logs.log.info("step 1")
    shown = lines(capfd.readouterr().err)
    assert [shown[0], shown[2]] == ["start", "step 1"]
    assert shown[1].startswith(f"warning: {tmp_path}/train.log goes no further: ")
    assert "No space left on device" in shown[1]
    assert len(shown) == 3


def test_a_log_that_cannot_be_opened(tmp_path):
    (tmp_path / "train.log").mkdir()
    with pytest.raises(InputError, match="cannot write to workdir"):
        logs.start_run(tmp_path)


def test_progress_is_a_line_at_intervals_where_there_is_no_terminal(capfd, monkeypatch):
    seconds = iter(range(0, 1000, 4))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(seconds))
    for primary in (True, False):
        monkeypatch.setattr(distributed, "is_primary", lambda primary=primary: primary)
        with logs.Progress("evaluation", 7, "batch") as progress:
            for _ in range(7):
                progress.advance()
        said = capfd.readouterr().err.splitlines()
        assert said == (["evaluation: batch 3 of 7", "evaluation: batch 6 of 7"] if primary else [])
