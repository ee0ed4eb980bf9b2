"""How far a long stage is: a bar in a terminal or a notebook, a line now and then in a file."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from runs import classification_run
from tsqlora import progress as module
from tsqlora.cli import main
from tsqlora.progress import Progress, Sayings, Stages, has_bars, in_notebook, progress

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
"""All but the end of a line."""
Capsys = pytest.CaptureFixture[str]


class Clock:
    """In the place of `time.monotonic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Iterator[Callable[[], str]]:
    """stderr is a pseudo-terminal; gives what it was sent, once it is closed."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    sent = bytearray()

    def read() -> None:
        with suppress(OSError):  # once the other end is closed
            while True:
                sent.extend(os.read(reading, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(writing, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            patch.setenv("TERM", "xterm")
            yield sent.decode
    finally:
        reader.join()
        os.close(reading)


def test_a_line_tells_share_count_rate_and_remaining_time(clock: Clock, capsys: Capsys) -> None:
    with progress("scoring", 6000, "samples", work=60_000) as passed:
        clock.now += 8
        passed(2400, 24_000)
    assert capsys.readouterr().err == (
        "scoring: 40 % (2,400 of 6,000 samples), 300 samples/s, 0:12 left\n"
    )


def test_share_and_remaining_time_go_by_the_work_and_the_rate_by_items(
    clock: Clock, capsys: Capsys
) -> None:
    with progress("scoring", 100, "samples", work=1000) as passed:
        clock.now += 30
        passed(10, 750)  # the long ones come first
    assert capsys.readouterr().err == "scoring: 75 % (10 of 100 samples), 3.0 s each, 0:10 left\n"


def test_what_is_short_leaves_no_line(clock: Clock, capsys: Capsys) -> None:
    with progress("evaluating", 10, "samples") as passed:
        for _ in range(10):
            clock.now += 0.4
            passed()
    assert capsys.readouterr().err == ""


def test_a_day_leaves_a_line_now_and_then_and_one_at_the_end(clock: Clock, capsys: Capsys) -> None:
    with progress("training", 86_400, "steps") as passed:
        for _ in range(86_400):
            clock.now += 1
            passed()
    *lines, last = capsys.readouterr().err.splitlines()
    assert 1400 < len(lines) < 1600
    assert last == "training: 86,400 steps in 24:00:00"
    assert "left" in lines[-1]


def test_what_was_done_before_counts_in_the_share_and_not_in_the_rate(
    clock: Clock, capsys: Capsys
) -> None:
    resumed = Progress("training", 100, "steps", done=80)
    clock.now += 10
    resumed(10)
    assert capsys.readouterr().err == "training: 90 % (90 of 100 steps), 1.0 steps/s, 0:10 left\n"
    assert resumed.took() == "10 steps in 10.0 s"


def test_what_another_process_tells_is_hidden(clock: Clock, capsys: Capsys) -> None:
    with progress("scoring", 2, "samples", hidden=True) as passed:
        clock.now += 3600
        passed()
    assert capsys.readouterr().err == ""


def test_a_stage_is_announced_once_and_is_not_there_already_when_it_was_done_just_now(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "tsqlora"):
        stages = Stages()
        stages.there("score")
        stages("plan", "ranks")
        stages("plan", "ranks")
        stages.there("plan")
    assert caplog.messages == ["1/4 Score: there already", "2/4 Plan: ranks"]


def test_a_stage_is_announced_where_nobody_has_set_logging_up_and_not_where_it_is_turned_down(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("tsqlora")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    Stages()("train", "60 samples an epoch")
    assert capsys.readouterr().err == "3/4 Train: 60 samples an epoch\n"
    monkeypatch.setattr(logger, "level", logging.WARNING)
    Stages()("train", "60 samples an epoch")
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_with_a_name_a_count_a_rate_and_a_remaining_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal(monkeypatch) as sent:
        clock = Clock(monkeypatch)
        with progress("scoring", 40, "samples") as passed:
            passed._bar.mininterval = 0
            for _ in range(4):
                clock.now += 1
                passed(10)
    bars = sent().split("\r")
    assert re.search(r"scoring:  75%\|.+\| .*<.*, 30 of 40 samples, 10 samples/s", sent()), bars
    assert bars[-1].strip() == "", "the bar is taken away at the end"


def test_a_bar_is_not_torn_by_what_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("tsqlora", logging.INFO, "", 0, "a sentence", None, None)
    with terminal(monkeypatch) as sent, progress("scoring", 2, "samples"):
        Sayings().emit(record)
    before, after = sent().split("a sentence")
    assert before.endswith("\r"), "the bar goes first"
    assert after.startswith("\r\n")
    assert "scoring" in after, "and comes back below"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch):
        assert has_bars()
        monkeypatch.setenv("TERM", "dumb")
        assert not has_bars()
    with terminal(monkeypatch, columns=0):
        assert not has_bars(), "tqdm shows nothing there"


def test_a_notebook_has_bars_though_its_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    assert not in_notebook()
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    assert has_bars()
    shell.config = {"TerminalIPythonApp": {}}
    assert not has_bars()


def test_a_run_in_a_terminal_names_what_each_bar_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    with terminal(monkeypatch) as sent:
        changes = {"training.disable_tqdm": None, "training.eval_strategy": "epoch"}
        assert main(["train", str(classification_run(tmp_path, **changes))]) == 0
    names = "brief adaptation", "quality scores", "layer sensitivity", "training", "evaluating"
    found = re.findall(r"\r([a-z ]+): +\d+%\|", sent())
    assert list(dict.fromkeys(found))[:4] == list(names[:4])
    assert set(found) == set(names)
    assert "{'loss'" not in sent() + capsys.readouterr().out


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a whole run, lines coming as often as they can, writes into a log file."""
    folder = tmp_path_factory.mktemp("logged")
    config = classification_run(folder, **{"training.disable_tqdm": None})
    script = (
        "import sys, tsqlora.progress as p; p.FIRST = p.SELDOM = 0.0; from tsqlora.cli import main;"
        "config, run, out = sys.argv[1:];"
        "sys.exit(main(['train', config])"
        " or main(['export', run, '--format', 'merged', '--out', out]))"
    )
    command = [sys.executable, "-c", script, str(config), str(folder / "run"), str(folder / "out")]
    log = folder / "log"
    with log.open("wb") as stream:
        done = subprocess.run(command, stdout=stream, stderr=stream)
    assert done.returncode == 0, log.read_text()
    return log.read_bytes().decode()


def test_a_log_file_has_no_control_characters(logged: str) -> None:
    assert not CONTROL.findall(logged), logged


def test_a_log_file_has_all_four_stages_in_their_order_and_how_far_each_is(logged: str) -> None:
    stages = re.findall(r"^(\d/4 \w+):", logged, re.MULTILINE)
    assert list(dict.fromkeys(stages)) == ["1/4 Score", "2/4 Plan", "3/4 Train", "4/4 Evaluate"]
    told = r"^{}: \d+ % \(\d+ of \d+ {}\), .*[^,]/s, \d+:\d\d left"
    for what, unit in (
        ("brief adaptation", "steps"),
        ("quality scores", "samples"),
        ("layer sensitivity", "samples"),
        ("training", "steps"),
        ("evaluating", "samples"),
    ):
        assert re.search(told.format(what, unit), logged, re.MULTILINE), (what, logged)
    assert re.search(r"^training: .* left, loss \d", logged, re.MULTILINE)
