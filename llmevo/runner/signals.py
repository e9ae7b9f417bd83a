"""Ctrl-C and SIGTERM as a request: the first ends a run tidily, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, final

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Raised inside `Stop.interruptible` by the first signal; nothing there needs to be finished."""


@final
class Stop:
    """While entered, turns signals into the two flags below.

    Args:
        note: Told one line for each signal, when `report` is called.

    Attributes:
        signal: The first signal that came, or None.
        cancelled: Whether a second one came.

    Signals reach the main thread only; entered from another thread, it never stops anything.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._interruptible = False
        self._lines: list[str] = []
        self._before: dict[signal.Signals, Any] = {}
        self.signal: signal.Signals | None = None
        self.cancelled = False

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.cancelled = True
        else:
            self.signal = signal.Signals(number)
        if self._interruptible:
            self._interruptible = False
            raise Interrupted
        # Printing here could meet a print that this signal interrupted; `report` does it.
        if self.cancelled:
            self._lines.append("stopping at once; what was in flight will be evaluated again")
        else:
            self._lines.append(f"{self.signal.name}: finishing what is in flight; once more to stop at once")

    def report(self) -> None:
        """Note what came since the last call."""
        while self._lines:
            self._note(self._lines.pop(0))

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, else 3: stopped early and resumable."""
        return 130 if self.signal is signal.SIGINT else 3

    @property
    def reason(self) -> str:
        """One line on the signal that came."""
        return "stopped" if self.signal is None else f"stopped by {self.signal.name}"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A wait that leaves nothing behind, such as for a reply or for models to load.

        Raises:
            Interrupted: A signal came, now or before.
        """
        if self.signal is not None:
            raise Interrupted
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
