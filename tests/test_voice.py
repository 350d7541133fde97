"""A run speaks once for all processes, and goes on where nobody listens or the disk is full."""

import os
import sys

import pytest

from rl import voice
from rl.voice import Stream, fail, going_on_without, has_given_up, keep_streams, say, say_first


@pytest.fixture(autouse=True)
def new_voice(monkeypatch):
    """Nothing has been said, and nobody else speaks."""
    monkeypatch.setattr(voice, "_given_up", set())
    monkeypatch.setattr(voice, "_is_first", voice._alone)
    monkeypatch.setattr(voice, "wait_for_rank_zero", lambda: None)


@pytest.fixture
def be_rank(monkeypatch):
    def be(rank, local_rank=None):
        local_rank = rank if local_rank is None else local_rank
        for name, value in zip(voice.LAUNCH_VARIABLES, (rank, local_rank, 4, 2, "localhost", 1), strict=True):
            monkeypatch.setenv(name, str(value))

    return be


def test_the_first_process_alone_speaks(be_rank, capsys):
    for rank in range(4):
        be_rank(rank)
        say(f"rank {rank}")
    assert capsys.readouterr() == ("", "rank 0\n")


def test_without_a_whole_launch_a_process_speaks_for_itself(be_rank, monkeypatch, capsys):
    be_rank(3)
    monkeypatch.delenv("MASTER_PORT")
    say("alone")
    assert capsys.readouterr().err == "alone\n"


def test_whoever_is_first_speaks_on_a_topic(be_rank, monkeypatch, capsys):
    be_rank(3)
    say_first("policy", "there is nobody to ask")
    spoken = set()
    monkeypatch.setattr(voice, "_is_first", None)
    voice.ask_before_speaking(lambda topic: not (topic in spoken or spoken.add(topic)))
    for topic in ("policy", "policy", "episodes"):
        say_first(topic, f"about {topic}")
    assert capsys.readouterr().err == "there is nobody to ask\nabout policy\nabout episodes\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "error"), [(0, 0, "error: no\n"), (1, 1, ""), (2, 0, "error: no\n"), (3, 1, "")]
)
def test_a_mistake_that_all_see_is_said_once_on_each_machine_and_ends_them_all(
    be_rank, capsys, rank, local_rank, error
):
    be_rank(rank, local_rank)
    with pytest.raises(SystemExit) as end:
        fail("no")
    assert (end.value.code, capsys.readouterr().err) == (1, error)


def test_a_stream_falls_silent_where_nobody_reads_it():
    read_end, write_end = os.pipe()
    stream = Stream(os.fdopen(write_end, "w"))
    assert stream.write("heard\n") == 6
    stream.flush()
    assert os.read(read_end, 100) == b"heard\n"
    os.close(read_end)
    assert stream.write("unheard" * 10_000) == 70_000
    stream.flush()
    with pytest.raises(BrokenPipeError):
        os.write(write_end, b"as it would have ended")


def test_a_stream_that_was_closed_before_the_start_takes_everything():
    stream = Stream(None)
    assert stream.write("text") == 4
    stream.flush()
    assert not stream.isatty()


def test_closed_streams_are_replaced_before_a_file_gets_their_numbers(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    closed = {1, 2}
    opened = []

    def fstat(descriptor):
        if descriptor in closed:
            raise OSError

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)))
    keep_streams()
    monkeypatch.undo()
    assert opened == [(os.devnull, os.O_RDWR)] * 2


def test_a_run_goes_on_without_what_the_disk_does_not_take_and_says_so_once_for_each_thing(capsys):
    for what in ("the log", "the log", "a video"):
        with going_on_without(what):
            raise OSError(28, "No space left on device")
    words = "cannot be written (No space left on device): training goes on without"
    assert capsys.readouterr().err == f"warning: the log {words}\nwarning: a video {words}\n"
    assert has_given_up()


def test_an_error_of_the_disk_may_be_wrapped_and_without_a_reason(capsys):
    with going_on_without("a video"):
        raise RuntimeError("the writer failed") from OSError("MoviePy says:\n  broken " + "x" * 300)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a video cannot be written (MoviePy says: broken xxx")
    assert len(line) < 300


def test_any_other_error_is_passed_on_and_where_all_is_written_nothing_is_said(capsys):
    with pytest.raises(ZeroDivisionError), going_on_without("the log"):
        1 / 0  # noqa: B018
    with going_on_without("the log"):
        pass
    assert capsys.readouterr().err == ""
    assert not has_given_up()
