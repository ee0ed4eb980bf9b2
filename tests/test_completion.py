"""Completion as real shells do it, from the script that `tsqlora completion` prints."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tsqlora.cli import main, parser
from tsqlora.completion import SHELLS, completion_script

VERBS = {"train", "score", "plan", "evaluate", "export", "report", "demo", "completion"}
CASES = [
    ("tsqlora ", VERBS),
    ("tsqlora ev", {"evaluate"}),
    ("tsqlora train --re", {"--resume"}),
    ("tsqlora export RUN --format ", {"compact", "padded", "merged"}),
    ("tsqlora completion fi", {"fish"}),
    ("tsqlora train mi", {"mine.yaml"}),
    ("tsqlora train other", {"other.yml"}),
    ("tsqlora evaluate ru", {"runs"}),
    ("tsqlora evaluate runs/m", {"runs/mine"}),
    ("tsqlora evaluate runs/mine --data mo", {"more.csv"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With files to complete, and the script of each shell."""
    made = tmp_path_factory.mktemp("completion")
    for name in ("mine.yaml", "other.yml", "mine.csv", "more.csv"):
        (made / name).touch()
    (made / "runs/mine").mkdir(parents=True)
    for shell in SHELLS:
        (made / f"script.{shell}").write_text(completion_script(parser(), shell))
    return made


def completed(folder: Path, *command: str) -> set[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return {line.split("\t")[0].rstrip("/ ") for line in done.stdout.splitlines()}


def needs(shell: str) -> str:
    """The shell's path, or a skip."""
    return shutil.which(shell) or pytest.skip(f"{shell} is not installed")


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash_completes(folder: Path, line: str, expected: set[str]) -> None:
    script = (
        'source script.bash; read -ra COMP_WORDS <<<"$1"; [[ $1 == *" " ]] && COMP_WORDS+=("");'
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1));"
        "$(complete -p tsqlora | sed 's/.*-F \\([^ ]*\\).*/\\1/');"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = completed(folder, needs("bash"), "-c", script, "bash", line)
    assert expected <= found
    assert expected in (VERBS, found)


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish_completes(folder: Path, line: str, expected: set[str]) -> None:
    script = "source script.fish; complete --do-complete $argv[1]"
    home = f"HOME={folder}"
    found = completed(folder, "env", home, needs("fish"), "--no-config", "-c", script, line)
    assert expected <= found


def test_zsh_completes(folder: Path) -> None:
    needs("zsh")
    with Zsh(folder) as zsh:
        assert zsh.after_tab("tsqlora ev") == "tsqlora evaluate"
        assert zsh.after_tab("tsqlora train --re") == "tsqlora train --resume"
        assert zsh.after_tab("tsqlora train mi") == "tsqlora train mine.yaml"
        assert zsh.after_tab("tsqlora evaluate ru") == "tsqlora evaluate runs/"
        assert zsh.after_tab("tsqlora export RUN --format pa").endswith("padded")


class Zsh:
    """An interactive zsh in a pseudo-terminal, which alone has completion."""

    def __init__(self, folder: Path) -> None:
        self.end, other = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PS1": "> ", "HOME": str(folder)}
        self.shell = subprocess.Popen(
            [needs("zsh"), "-fi"], cwd=folder, stdin=other, stdout=other, stderr=other,
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(other)
        self.send("autoload -Uz compinit; compinit -u -D\n")
        self.send('eval "$(<script.zsh)"; show() { print -r -- "<<$BUFFER>>" }; zle -N show\n')
        self.send("bindkey '^X^B' show; print rea''dy\n")
        self.until("ready")

    def __enter__(self) -> Zsh:
        return self

    def __exit__(self, *_: object) -> None:
        self.shell.kill()
        self.shell.wait()
        os.close(self.end)

    def send(self, text: str) -> None:
        os.write(self.end, text.encode())

    def until(self, mark: str) -> str:
        found = ""
        while mark not in found and select.select([self.end], [], [], 30)[0]:
            found += os.read(self.end, 65536).decode()
        assert mark in found, found
        return found

    def after_tab(self, line: str) -> str:
        """The line that is there after the tabulator was pressed at its end."""
        self.send(f"{line}\t\x18\x02")
        shown = self.until(">>")
        self.send("\x15")
        return shown.split("<<")[1].split(">>")[0].rstrip()


def test_a_reader_that_has_read_enough_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tsqlora", "completion", "bash"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.strip() == completion_script(parser(), shell).strip()
    assert all(verb in script for verb in VERBS)
