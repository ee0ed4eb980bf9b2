"""Ctrl-C, and SIGTERM as schedulers send it before they kill: an orderly stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """The stop that SIGTERM asked for."""


def stop(number: int, *_: object) -> None:
    """Stop at once: the handler wherever nothing has to be saved first.

    Raises:
        Terminated: on SIGTERM.
        KeyboardInterrupt: on SIGINT.
    """
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handling(handler: Callable[..., None]) -> Iterator[None]:
    """Inside, `handler` takes both signals, but those that are ignored stay so (`nohup`).

    Outside the main thread signals cannot be caught, and nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        there = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: h for n, h in there.items() if h not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
