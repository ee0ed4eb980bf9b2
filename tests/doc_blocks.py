"""README and docs as blocks, and how each kind of block is run or checked."""

from __future__ import annotations

import csv
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tsqlora.cli import main, parser
from tsqlora.config import RunConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
PARTIAL = {
    "model": "model",
    "task": "classification",
    "data": {"train": "train.jsonl", "validation": 0.1, "text": "text", "target": "label"},
    "output": "runs/partial",
}
"""What a configuration needs besides the keys that a page shows."""
TINY = {
    "model": "model",
    "quality.adapt_steps": 3,
    "training.num_train_epochs": 1,
    "training.per_device_train_batch_size": 8,
    "training.disable_tqdm": "true",
}
"""What makes a run one of seconds."""

ELSEWHERE = {
    "runs/mine/tensorboard/": "tests/test_reported.py",
    "runs/mine/untrained/": "tests/test_existing_adapter.py",
}
"""What only other commands than the page's leave in a run, and the tests that it is there."""

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\s*\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NAMED = re.compile(r"(?<!`)`((?:python -m )?tsqlora [^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it can only be checked, where that is so."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """All of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, m.start("text")), m["language"], m["text"], m["reason"])
        for m in _BLOCK.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), page
    return found


def named_commands(page: str) -> list[list[str]]:
    """Words after `tsqlora` that a sentence names; of a choice the first, a verb alone as help."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = _BLOCK.sub("", text)
    lines = [" ".join(line.replace("...", "").split()) for line in _NAMED.findall(prose)]
    found = [[word.split("|")[0] for word in shlex.split(line)] for line in lines]
    found = [words[words.index("tsqlora") + 1 :] for words in found]
    return [[*words, "--help"] if len(words) == 1 else words for words in found]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command; comments, settings of variables and `eval` taken off."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words and words[0] == "eval":
            words = shlex.split(words[1].removeprefix("$(").removesuffix(")"))
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def run_yaml(block: Block) -> None:
    """A configuration, or a part of one; kept as a file where its first line names one."""
    values = yaml.safe_load(block.text)
    if name := re.match(r"# (\S+\.yaml)\n", block.text):
        Path(name[1]).write_text(block.text)
    RunConfig.from_dict(values if "model" in values else {**PARTIAL, **values})


def run_csv(block: Block) -> None:
    """The first rows of the file of this page that has these columns."""
    rows = list(csv.DictReader(io.StringIO(block.text)))
    assert rows
    assert all(None not in row and None not in row.values() for row in rows)
    heads = {path.read_text().splitlines()[0] for path in Path().glob("*.csv")}
    assert block.text.splitlines()[0] in heads


def run_text(block: Block) -> None:
    """A tree of files, all of which are there: in a run of this page, or in the repository."""
    folder = ""
    for line in block.text.splitlines():
        indent, name = re.match(r"( *)(\S*)", line).groups()  # type: ignore[union-attr]
        if len(indent) > 2 or not name:
            continue  # the rest of a comment
        if not indent and name.endswith("/"):
            folder = name if " " not in line.strip() else ""
        path = f"{folder}{name}" if indent else name
        if path in ELSEWHERE:
            assert name.strip("/") in (ROOT / ELSEWHERE[path]).read_text("utf-8"), path
            continue
        runs = [Path("runs", each.name, name) for each in Path("runs").glob("*")]
        places = runs if path.startswith("runs/") else [ROOT / path]
        assert any(place.exists() for place in places) or path == folder, path


def run_shell(block: Block) -> None:
    """Ours are run, others checked; who can be neither needs a reason."""
    for words in commands(block.text):
        if words[0] == "tsqlora":
            run_ours(words[1:])
        elif check := CHECKS.get(words[0]):
            check(words[1:])
        else:
            assert block.reason, f"neither run nor checked, and no reason given: {words}"


def run_ours(words: list[str]) -> None:
    """`tsqlora ...` on tiny data; to where it would be refused for what an earlier one left."""
    parses(words)
    verb = words[0]
    extra: list[str] = []
    if verb in ("train", "score", "plan"):
        extra = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
        if words[1].endswith(".yaml"):
            changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            output = Path(RunConfig.from_yaml(words[1], changes).output)
            if (output / "adapter").exists() and "--resume" not in words:
                extra += ["--set", f"output={output}-{len(list(output.parent.iterdir()))}"]
    if verb == "init" or (verb == "score" and not words[1].endswith(".yaml")):
        extra += ["--model", "model"]
    try:
        status = main([*words, *extra])
    except SystemExit as ended:  # --help and --version
        status = int(ended.code or 0)
    assert status == 0, words


def parses(words: list[str]) -> None:
    """The command's own parser takes it."""
    code = 0
    try:
        parser().parse_args(words)
    except SystemExit as ended:  # --help and --version
        code = int(ended.code or 0)
    assert code == 0, words


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets), words


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in words[1:]:
        own = re.fullmatch(r"(?:\.|tsqlora)(?:\[([\w,]+)\])?", word)
        asked = set((own[1] or "").split(",")) - {""} if own else set()
        assert asked <= set(project["optional-dependencies"]), word


def check_pytest(words: list[str]) -> None:
    marks = re.findall(r'"markers", "(\w+):', (ROOT / "tests/conftest.py").read_text())
    for before, word in zip(["", *words], words, strict=False):
        assert before != "-m" or word in marks, word
        assert not word.startswith("tests/") or (ROOT / word).is_file(), word


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    _check_launched(launch_command_parser().parse_args(words[1:]))


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    _check_launched(get_args_parser().parse_args(words))


def _check_launched(asked: Any) -> None:
    assert (asked.module, asked.training_script) == (True, "tsqlora"), asked
    parses(asked.training_script_args)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
}
RUNS: dict[str, Callable[[Block], None]] = {
    "yaml": run_yaml,
    "csv": run_csv,
    "text": run_text,
    "sh": run_shell,
}
"""By language; Python and diffs are the test's own."""
