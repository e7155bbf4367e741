"""The worker gets only as many calls, and as many bytes, as it can use; it keeps them until their replies."""

from __future__ import annotations

from atserving.errors import ServingError
from atserving.link import Reply
from evaluator.serving.calls import SupervisedCall
from evaluator.serving.window import Window
from evaluator.worker.plan import Plan

MIB = 1 << 20
PLAN = Plan(1, 1, 8, preparers=1)
"""A plan whose worker gets 17 calls, and 32 MiB."""


class Taker:
    """Takes no outcome."""

    def answered(self, reply: Reply) -> None: ...

    def failed(self, error: ServingError) -> None: ...


class Sender:
    """Sends calls as the supervisor does."""

    def __init__(self, *sizes: int) -> None:
        self.window = Window()
        self.calls: dict[int, SupervisedCall] = {}
        self.submit(*sizes)

    def submit(self, *sizes: int) -> None:
        for size in sizes:
            one = SupervisedCall(len(self.calls), b"r", bytes(size), 0.0, 0.0, Taker(), True)
            self.calls[one.id] = one
            self.window.waiting.append(one)

    def send(self) -> list[SupervisedCall]:
        """Send all that may be sent now."""
        sent: list[SupervisedCall] = []
        while calls := self.window.next(PLAN, self.calls):
            for one in calls:
                self.window.enter(one, 1.0)
            sent += calls
        return sent


def test_small_calls_are_bounded_by_their_number() -> None:
    sender = Sender(*[1000] * 40)
    sent = sender.send()
    assert len(sent) == sender.window.sent == 17
    for one in sent[:5]:
        sender.window.leave(one)
    assert len(sender.send()) == 5


def test_large_calls_are_bounded_by_their_bytes_until_the_replies() -> None:
    sender = Sender(*[10 * MIB] * 17)
    sent = sender.send()
    assert len(sent) == 4
    # The callers leave, so the front holds the requests no more. The worker does.
    for one in sent:
        one.request = b""
    assert not sender.send()
    sender.window.leave(sent[0])
    assert len(sender.send()) == 1


def test_one_call_always_goes() -> None:
    sender = Sender(100 * MIB, 1000)
    (large,) = sender.send()
    sender.window.leave(large)
    assert len(sender.send()) == 1


def test_a_new_worker_has_no_calls() -> None:
    sender = Sender(100 * MIB)
    sender.send()
    sender.window.restart(sender.calls.values())
    assert sender.window.sent == 0
    assert len(sender.send()) == 1
