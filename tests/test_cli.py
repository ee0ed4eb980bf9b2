"""The command's manners: what goes to stdout and to stderr, and the status it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import classification_run
from tsqlora.cli import main

VERBS = ("train", "score", "plan", "evaluate", "export", "report", "demo")


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
