"""Progress of long commands: one line on a terminal, a line every ten seconds in a file."""

import pytest

from cnkernels import progress


@pytest.fixture
def clock(monkeypatch):
    """Sets what `time.monotonic` says."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def set_to(seconds):
        now[0] = seconds

    return set_to


def test_a_file_gets_a_line_every_ten_seconds(clock, capsys):
    report = progress.Progress(40)
    for seconds, done in ((101, 1), (109, 4), (110, 5), (111, 6), (121, 10)):
        clock(seconds)
        report(done, f"trial {done}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["5/40 trial 5, 70 s left", "10/40 trial 10, 63 s left"]


def test_a_terminal_gets_one_line_that_is_rewritten(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    report = progress.Progress(2)
    clock(104)
    report(0, "first")
    report(1, "second")
    report(2, "second")
    assert capsys.readouterr().err == "\r\033[K0/2 first\r\033[K1/2 second, 4 s left\r\033[K2/2 second\n"
