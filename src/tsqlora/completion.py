"""Completion in a shell: the script that shtab makes of the verbs, their options and choices."""

from __future__ import annotations

import argparse

from tsqlora.arguments import subparsers

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What `shell` reads to complete verbs, options, choices, YAML files, folders and files."""
    import shtab

    yaml = shtab.glob("*.yaml", "*.yml")
    by_metavar = {
        "CONFIG.yaml": yaml,
        "F.yaml": yaml,
        "CONFIG.yaml|DATA": shtab.FILE,
        "RUN": shtab.DIRECTORY,
        "DIR": shtab.DIRECTORY,
        "DATA": shtab.FILE,
        "F": shtab.FILE,
    }
    for each in subparsers(parser).values():
        for action in each._actions:
            if action.metavar in by_metavar:
                action.complete = by_metavar[action.metavar]  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))
