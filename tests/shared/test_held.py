"""The bytes that an owner holds leave room for others."""

from __future__ import annotations

import pytest

from atserving.held import HeldBytes, Share

MIB = 1 << 20
MOST = 256 * MIB
LARGE = MOST * 3 // 4


def fill(held: HeldBytes, owners: list[str]) -> dict[str, list[Share]]:
    """Let owners by turns hold one more MiB each, until none may."""
    shares: dict[str, list[Share]] = {owner: [] for owner in owners}
    refused: set[str] = set()
    while len(refused) < len(owners):
        for owner in owners:
            assert held.take(MIB, large=True)
            if share := held.share(owner, MIB):
                shares[owner].append(share)
            else:
                held.give(MIB)
                refused.add(owner)
    return shares


@pytest.mark.parametrize(("count", "part"), [(1, 2 / 3), (2, 2 / 5), (3, 2 / 7), (10, 2 / 21)])
def test_owners_that_take_all_they_get_leave_room(count: int, part: float) -> None:
    held = HeldBytes(MOST)
    shares = fill(held, [str(number) for number in range(count)])
    assert {len(each) for each in shares.values()} <= {int(LARGE * part / MIB) + more for more in (-1, 0, 1)}
    left = LARGE - held.held
    assert left >= LARGE // (2 * count + 2)
    # The next has it.
    assert held.take(left, large=True)
    assert held.share("next", left)


def test_an_owner_that_gives_all_back_starts_again() -> None:
    held = HeldBytes(MOST)
    for _ in range(3):
        (shares,) = fill(held, ["one"]).values()
        assert len(shares) == LARGE * 2 // 3 // MIB
        for share in shares:
            share.give(MIB)
        assert held.held == 0
        assert not held._owned


def test_an_answer_has_room_while_there_is_any() -> None:
    held = HeldBytes(MOST)
    (shares,) = fill(held, ["one"]).values()
    left = LARGE - held.held
    assert not shares[0].take(left + 1, large=True)
    assert shares[0].take(left, large=True)
    shares[0].give(left)
    assert held.held == len(shares) * MIB
