"""Many deadlines share one timer: each call whose deadline passes while it is pending expires once."""

from __future__ import annotations

import asyncio
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from atserving.deadlines import Deadlines

WAIT_S = 30.0
CALLS = st.lists(st.tuples(st.floats(0, 0.02), st.booleans()), min_size=1, max_size=50)


@settings(max_examples=20, deadline=None)
@given(CALLS)
def test_each_pending_call_expires_once_and_not_before_its_deadline(calls: list[tuple[float, bool]]) -> None:
    async def run() -> None:
        pending: dict[int, float] = {}
        expired: dict[int, float] = {}
        done = asyncio.Event()

        def expire(id_: int) -> None:
            assert id_ not in expired
            expired[id_] = time.monotonic()
            del pending[id_]
            if not pending:
                done.set()

        deadlines = Deadlines(pending, expire)
        began_s = time.monotonic()
        deadlines_s = {id_: began_s + after_s for id_, (after_s, _) in enumerate(calls)}
        for id_, deadline_s in deadlines_s.items():
            pending[id_] = deadline_s
            deadlines.add(deadline_s, id_)
        answered = {id_ for id_, (_, answers) in enumerate(calls) if answers}
        for id_ in answered:
            del pending[id_]
        if pending:
            await asyncio.wait_for(done.wait(), WAIT_S)
        await asyncio.sleep(0.001)
        assert set(expired) == set(deadlines_s) - answered
        assert all(at_s >= deadlines_s[id_] for id_, at_s in expired.items())

    asyncio.run(run())


async def test_entries_of_answered_calls_do_not_pile_up() -> None:
    pending: dict[int, None] = {}
    deadlines = Deadlines(pending, lambda _: None)
    for id_ in range(10_000):
        pending[id_] = None
        deadlines.add(time.monotonic() + WAIT_S, id_)
        if id_ >= 10:
            del pending[id_ - 10]
    assert len(deadlines._heap) < 200
    deadlines.close()
