"""Command-line arguments: argparse, with the nearest word where one is not known."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

YAML = (".yaml", ".yml")


class Parser(argparse.ArgumentParser):
    """Ends with status 2 and one message, as all mistakes of the user do."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and what was probably meant."""
        unknown = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        options = re.search(r"unrecognized arguments: .*?(--?[\w-]+)", message)
        meant = ""
        if unknown:
            known = re.findall(r"[\w-]+", unknown[2])
            meant = _nearest(unknown[1], known)
            if message.startswith("argument VERB"):
                message = f"there is no verb {unknown[1]!r}, but {', '.join(known)}"
                if Path(unknown[1]).suffix in YAML:
                    meant = f" Did you mean: {self.prog} train {unknown[1]}"
        elif options:
            meant = _nearest(options[1], [*_options(self)])
        self.exit(2, f"{self.prog}: {message}.{meant}\nSee {self.prog} --help.\n")


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the verbs."""
    return {
        name: sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, sub in action.choices.items()
    }


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All options, those of the verbs too."""
    for each in (parser, *subparsers(parser).values()):
        for action in each._actions:
            yield from action.option_strings


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {found[0]}?" if found else ""
