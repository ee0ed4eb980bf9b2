"""A folder that is one process's alone, for as long as the process lives."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tsqlora.errors import RunError

PATIENCE = 10.0
"""Seconds of waiting for a folder: the data loaders of a killed process outlive it for a while."""


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Inside, no other process can claim the folder `path`, so that two do not write the same run.

    The claim ends with the process, however that ends. Where the operating system or the file
    system knows no such locks, nothing is claimed.

    Raises:
        RunError: another process has claimed it.
    """
    folder, descriptor = Path(path).expanduser(), None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        last = time.monotonic() + PATIENCE
        while descriptor is not None and _is_taken(descriptor):
            if time.monotonic() > last:
                raise RunError(
                    f"Another process works in {folder}: wait for it, stop it, or choose another "
                    "`output`."
                )
            time.sleep(0.2)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_taken(descriptor: int) -> bool:
    """Whether another process holds the lock; this one's from now on if not."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return False
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False
