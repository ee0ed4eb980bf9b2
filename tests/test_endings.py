"""What a verb says at its end tells what lies where and what can be done next, in commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from runs import causal_run
from tsqlora.cli import main, parser
from tsqlora.endings import readable


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_run(tmp_path_factory.mktemp("endings"))


@pytest.mark.parametrize("verb", ["score", "plan", "train"])  # one goes on from another
def test_the_paths_that_are_named_are_there_and_the_commands_parse(
    verb: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(config)]) == 0
    told, after = capsys.readouterr().out.split("\nnext:\n")
    paths = re.findall(rf"{re.escape(str(config.parent))}\S*", told)
    assert paths
    assert all(Path(path).exists() for path in paths)
    commands = [shlex.split(line, comments=True) for line in after.splitlines()]
    assert {words[0] for words in commands} <= {"tsqlora", "open"}
    for _, *arguments in (words for words in commands if words[0] == "tsqlora"):
        parser().parse_args(arguments)
    for words in (words for words in commands if words[0] == "open"):
        assert Path(words[1]).is_file()


def test_a_training_tells_metrics_before_and_after_and_what_it_cost(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--resume"]) == 0
    told = capsys.readouterr().out
    for name in ("before", "validation"):
        assert re.search(rf"^{name} +loss \d", told, re.MULTILINE)
    assert re.search(r"^cost +scoring \d+ s and \d+ sample passes, training \d+ s", told, re.M)
    assert "version" not in told


def test_every_value_takes_one_line_whatever_is_in_it() -> None:
    said = readable({"text": "{question}\n{context}", "cost": {"passes": 0.5, "kept": "a\nb"}})
    assert said.splitlines() == [
        r"text: {question}\n{context}",
        "cost:",
        "  passes: 0.5",
        r"  kept: a\nb",
    ]
