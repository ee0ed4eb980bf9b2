"""How far a long stage is: a bar in a terminal or a notebook, a plain line now and then in a file.

Which of them it is, is decided here alone, for all bars of ours.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

logger = logging.getLogger("tsqlora")

STAGES = ("score", "plan", "train", "evaluate")
"""Of a whole run, in their order."""
FIRST, SHARE, SELDOM = 5.0, 0.05, 60.0
"""Seconds before the first line; before each further one this share of what has passed, but at
least as many as before the first and at most so many."""
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Stages:
    """Announces the stages of a run, and the parts of each; the same thing once."""

    def __init__(self) -> None:
        self._said: dict[str, set[str]] = {stage: set() for stage in STAGES}

    def __call__(self, stage: str, what: str) -> None:
        """Say what a stage begins to do."""
        if what not in self._said[stage]:
            number = f"{STAGES.index(stage) + 1}/{len(STAGES)}"
            tell(f"{number} {stage.capitalize()}: {what}")
        self._said[stage].add(what)

    def there(self, stage: str) -> None:
        """Say that there is nothing left to do, unless it was done just now."""
        if not self._said[stage]:
            self(stage, "there already")


class Progress:
    """How much of a stage is done, told as it goes on.

    Rate and count are in `unit`; share and remaining time go by the work done where items differ
    in it, as long samples and short ones do.

    Args:
        what: what is being done.
        total: items in all.
        unit: what they are, in the plural.
        work: the work of all items together, where they are not alike.
        done: items that were done before, each as much work as any.
        lines: lines wherever it is, as `training.disable_tqdm` asks for.
        hidden: nothing at all, as another process tells of it.
        delay: seconds before a bar is shown.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        work: int | None = None,
        done: int = 0,
        lines: bool = False,
        hidden: bool = False,
        delay: float = 0.0,
    ) -> None:
        self.what, self.total, self.unit, self.note = what, total, unit, ""
        self.work, self.worked = work or total, done
        self.done = self.before = done
        self.began = time.monotonic()
        self._next, self._told = math.inf if hidden else self.began + FIRST, False
        self._bar: Any = None
        if not lines and not hidden and has_bars():
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=self.work,
                initial=done,
                desc=what,
                bar_format=_FORMAT,
                leave=False,
                delay=delay,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def __call__(self, items: int = 1, work: int | None = None) -> None:
        """So many items more are done."""
        work = items if work is None else work
        self.done, self.worked = self.done + items, self.worked + work
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._counts()), refresh=False)
            self._bar.update(work)
        elif (now := time.monotonic()) >= self._next:
            wait = min(SELDOM, max(FIRST, SHARE * (now - self.began)))
            self._next, self._told = now + wait, True
            say(self._line(now))

    def close(self, last: bool = True) -> None:
        """The bar is taken away; lines end with a `last` one that says what it took."""
        if self._bar is not None:
            self._bar.close()
        elif last and self._told and self.done >= self.total:
            say(f"{self.what}: {self.took()}")
        self._told = False

    def took(self) -> str:
        """What was done, and in which time."""
        seconds = time.monotonic() - self.began
        time_taken = clock(seconds) if seconds >= 60 else f"{seconds:.1f} s"
        return f"{self.done - self.before:,} {self.unit} in {time_taken}"

    def _line(self, now: float) -> str:
        count, *others = self._counts()
        left, since = self.work - self.worked, self.worked - self.before
        if since:
            others.insert(1, f"{clock((now - self.began) * left / since)} left")
        share = 100 * self.worked / max(self.work, 1)
        return ", ".join([f"{self.what}: {share:.0f} % ({count})", *others])

    def _counts(self) -> list[str]:
        seconds = time.monotonic() - self.began
        count = f"{self.done:,} of {self.total:,} {self.unit}"
        return [
            count,
            _rate(self.done - self.before, seconds, self.unit),
            *filter(None, [self.note]),
        ]


@contextmanager
def progress(
    what: str,
    total: int,
    unit: str,
    work: int | None = None,
    hidden: bool = False,
    delay: float = 0.0,
) -> Iterator[Progress]:
    """A `Progress`, closed at the end."""
    shown = Progress(what, total, unit, work, hidden=hidden, delay=delay)
    try:
        yield shown
    finally:
        shown.close()


def has_bars() -> bool:
    """Whether stderr shows bars: a terminal, or a notebook; else it is a file, or a pipe."""
    return in_notebook() or _is_terminal(sys.stderr)


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def tell(text: str) -> None:
    """Log a line; say it where nobody has set logging up, as in a notebook."""
    if logger.level == logging.NOTSET and not logging.getLogger().handlers:
        say(text)
    else:
        logger.info(text)


def say(text: str) -> None:
    """A line on stderr, above the bars that there are."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)
    sys.stderr.flush()


class Sayings(logging.Handler):
    """What is logged, by `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, or more."""
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


def hide_others() -> None:
    """Bars of the libraries only where ours are; to be called before they are imported."""
    if not has_bars():
        for name in (
            "TQDM_DISABLE",
            "HF_HUB_DISABLE_PROGRESS_BARS",
            "HF_DATASETS_DISABLE_PROGRESS_BARS",
        ):
            os.environ.setdefault(name, "1")


def clock(seconds: float) -> str:
    """0:12, or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(items: int, seconds: float, unit: str) -> str:
    rate = items / max(seconds, 1e-9)
    if 0 < rate < 1:
        return f"{1 / rate:.1f} s each"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


def _is_terminal(stream: TextIO) -> bool:
    """Whether it is one that can go back in a line, and knows how wide it is."""
    if os.environ.get("TERM") == "dumb":
        return False
    with suppress(OSError, ValueError, AttributeError):
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    return False
