"""Runs a coroutine on the event loop without a task, which would cost more than the steps of a short one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")


class Running(Generic[ResultT]):
    """A coroutine that runs from its start to its first wait at once, and on whenever a future that it awaits is done.

    It may await futures, and coroutines that do. It is in no task, so ``asyncio.timeout``, ``asyncio.TaskGroup`` and
    everything else that asks for the current task do not work inside; what needs them belongs into a task, which it
    may await.
    """

    __slots__ = ("_cancelled", "_coroutine", "_done", "_waiting", "done")

    def __init__(
        self, coroutine: Coroutine[Any, Any, ResultT], done: Callable[[ResultT | None, BaseException | None], None]
    ) -> None:
        """``done`` gets the result, or the exception; CancelledError after :meth:`cancel`. It must not raise."""
        self.done = self._cancelled = False
        self._coroutine = coroutine
        self._done = done
        self._waiting: asyncio.Future[Any] | None = None
        self._step(None)

    def cancel(self) -> None:
        """Cancel what the coroutine waits for; if that is done by now, cancel the coroutine at its next step."""
        if not (self._waiting and self._waiting.cancel()):
            self._cancelled = True

    def _step(self, _: object) -> None:
        self._waiting = None
        cancelled, self._cancelled = self._cancelled, False
        try:
            waiting: asyncio.Future[Any] = (
                self._coroutine.throw(asyncio.CancelledError()) if cancelled else self._coroutine.send(None)
            )
        except StopIteration as end:
            self.done = True
            self._done(end.value, None)
        except BaseException as error:
            self.done = True
            self._done(None, error)
        else:
            # The protocol between a future and its task.
            waiting._asyncio_future_blocking = False
            self._waiting = waiting
            waiting.add_done_callback(self._step)
            if self._cancelled:
                self._cancelled = False
                waiting.cancel()
