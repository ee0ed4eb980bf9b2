"""The command's manners: what goes to stdout and to stderr, and the status it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runs import classification_run
from tsqlora.cli import main, parser

VERBS = ("train", "score", "plan", "evaluate", "export", "report", "init", "demo", "completion")


def test_stdout_holds_the_result_alone_and_libraries_do_not_warn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert main(["train", str(classification_run(tmp_path)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(tmp_path / "run")
    assert not recwarn.list


@pytest.mark.parametrize("arguments", [(), *((verb,) for verb in VERBS)])
def test_every_verb_helps(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    assert "usage: tsqlora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian", "mine.yaml"], "no verb 'trian', but train, score, .* Did you mean train?"),
        (["mine.yaml"], "Did you mean: tsqlora train mine.yaml"),
        (["train", "mine.yaml", "--resmue"], "--resmue. Did you mean --resume?"),
        (["export", "r", "--format", "mreged", "--out", "d"], "'mreged' .* Did you mean merged?"),
        (["demo", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["completion"], "required: shell"),
    ],
)
def test_a_mistyped_word_is_told_with_the_nearest_one_that_there_is(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert re.search(says.replace("?", r"\?"), found.err)
    assert re.search(r"See tsqlora( \w+)? --help\.\n$", found.err)


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == parser().format_help()
