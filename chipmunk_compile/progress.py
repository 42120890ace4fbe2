"""A progress bar where tqdm is installed, lines of text where it is not."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


class Silent:
    """No progress is shown."""

    def at(self, what: str) -> None:
        """Says what is being done now."""

    def advance(self) -> None:
        """One more is done."""


class Lines(Silent):
    """One line on stderr for everything that begins."""

    def __init__(self, total: int, title: str) -> None:
        self._total, self._title, self._done, self._started = total, title, 0, time.monotonic()

    def at(self, what: str) -> None:
        passed = time.monotonic() - self._started
        print(f"{self._title} {self._done}/{self._total} ({passed:.0f} s): {what}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        self._done += 1


class _Bar(Silent):
    def __init__(self, bar) -> None:
        self._bar = bar

    def at(self, what: str) -> None:
        self._bar.set_postfix_str(what)

    def advance(self) -> None:
        self._bar.update()


@contextlib.contextmanager
def progress_bar(total: int, title: str, shown: bool) -> Iterator[Silent]:
    """total: of steps, at most: fewer may be needed."""
    if not shown:
        yield Silent()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield Lines(total, title)
        return
    with tqdm(total=total, desc=title) as bar:
        yield _Bar(bar)
