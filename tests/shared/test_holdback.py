"""The holdback: which deletions wait, for how long, and what ends the wait."""

from __future__ import annotations

import asyncio
from collections.abc import Set

import pytest

from atserving import holdback
from atserving.config import ACCEPT_KEY, PREFIX
from atserving.holdback import Holdback
from tests.waiting import until

RELEASES = [f"{PREFIX}eval/app/v{number}" for number in range(5)]
INSTANCE, RULES = f"{PREFIX}instance/app/v0/i", f"{PREFIX}app/metadata/app"
ALL = {*RELEASES, INSTANCE, RULES}
NONE: Set[str] = frozenset()


class Config:
    """The keys of a config behind a holdback."""

    def __init__(self, keys: Set[str] = ALL, hold_s: float = 600) -> None:
        self.keys = set(keys)
        self.holdback = Holdback(hold_s, self._take)

    def _take(self, keys: Set[str]) -> None:
        self.keys -= keys

    def delete(self, *keys: str, vetted: bool = False) -> None:
        self.keys -= self.holdback.taken(self.keys, NONE, set(keys), vetted=vetted)

    def snapshot(self, *keys: str) -> None:
        taken = self.holdback.taken(self.keys, set(keys), self.keys - set(keys), snapshot=True)
        self.keys = (self.keys | set(keys)) - taken

    def write(self, *keys: str) -> None:
        taken = self.holdback.taken(self.keys, set(keys), NONE)
        self.keys = (self.keys | set(keys)) - taken


@pytest.mark.parametrize(
    ("known", "deleted", "held"),
    [(1, 1, False), (2, 1, False), (2, 2, True), (3, 2, True), (4, 2, False), (5, 2, False), (5, 3, True)],
)
async def test_more_than_half_of_the_releases_and_at_least_two_wait(known: int, deleted: int, held: bool) -> None:
    config = Config(set(RELEASES[:known]))
    config.delete(*RELEASES[:deleted])
    assert config.keys == set(RELEASES[:known] if held else RELEASES[deleted:known])
    assert config.holdback.held == set(RELEASES[:deleted] if held else [])


@pytest.mark.parametrize("kind", ["eval/app", "app/metadata"])
@pytest.mark.parametrize(
    ("known", "lacks", "held"),
    [(1, 1, True), (2, 1, True), (3, 1, False), (3, 2, True), (4, 1, False), (4, 2, True), (5, 2, False), (5, 3, True)],
)
async def test_half_of_the_releases_that_a_snapshot_lacks_wait(kind: str, known: int, lacks: int, held: bool) -> None:
    keys = [f"{PREFIX}{kind}/{number}" for number in range(known)]
    config = Config({*keys})
    config.snapshot(*keys[lacks:])
    assert config.keys == set(keys if held else keys[lacks:])
    assert config.holdback.held == set(keys[:lacks] if held else [])
    # The next snapshot of the same kind changes nothing.
    config.snapshot(*keys[lacks:])
    assert config.keys == set(keys if held else keys[lacks:])


async def test_a_deletion_that_was_seen_does_not_count_with_a_snapshot_of_other_keys() -> None:
    config = Config({*RELEASES[:2], *(f"{PREFIX}app/metadata/{app}" for app in "abc")})
    config.delete(RELEASES[0])
    config.snapshot(RELEASES[1], f"{PREFIX}app/metadata/a", f"{PREFIX}app/metadata/b")
    assert config.keys == {RELEASES[1], f"{PREFIX}app/metadata/a", f"{PREFIX}app/metadata/b"}


async def test_malformed_releases_that_were_never_in_use_do_not_count() -> None:
    config = Config({*RELEASES})
    config.delete(*(f"{PREFIX}eval/app/bad{number}" for number in range(9)))
    assert not config.holdback.held


async def test_instances_come_and_go_while_the_releases_of_others_wait() -> None:
    others = [f"{PREFIX}instance/app/v4/{name}" for name in "abc"]
    config = Config({*RELEASES, INSTANCE, *others})
    config.delete(*RELEASES[:3], others[0])
    assert config.keys == {*RELEASES, INSTANCE, *others[1:]}
    config.delete(others[1], INSTANCE)
    # Without its release in etcd an instance cannot renew its lease.
    assert config.keys == {*RELEASES, INSTANCE, others[2]}
    assert config.holdback.held == {*RELEASES[:3], INSTANCE}
    config.snapshot(*RELEASES[3:])
    assert config.keys == {*RELEASES, INSTANCE}
    # Its own release is back, and it is not.
    config.write(RELEASES[0])
    assert config.keys == {*RELEASES}


async def test_an_instance_waits_with_its_release_even_if_a_registry_without_memory_deletes_it() -> None:
    config = Config()
    config.snapshot(INSTANCE)
    assert config.holdback.held == {*RELEASES, RULES}
    config.delete(INSTANCE, vetted=True)
    assert config.keys == ALL
    config.delete(RELEASES[0], vetted=True)
    assert config.keys == ALL - {INSTANCE, RELEASES[0]}


async def test_rules_that_wait_still_do_so_after_the_next_snapshot() -> None:
    rules = [f"{PREFIX}app/metadata/{app}" for app in "abcdefg"]
    config = Config({*rules[:3]})
    config.delete(*rules[:2])
    config.write(*rules[3:])
    config.snapshot(*rules[2:])
    assert config.keys == {*rules}
    assert config.holdback.held == {*rules[:2]}


async def test_releases_deleted_one_after_the_other_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    for release in RELEASES:
        config.delete(release)
    assert config.keys == {*RELEASES[2:], INSTANCE, RULES}
    monkeypatch.setattr(holdback, "WINDOW_S", -1.0)
    config = Config()
    for release in RELEASES:
        config.delete(release)
    assert config.keys == {INSTANCE, RULES}


async def test_who_deletes_key_by_key_opens_no_more_than_the_first_closed_apps() -> None:
    rules = [f"{PREFIX}app/metadata/{app}" for app in "abcde"]
    config = Config({*rules, *RELEASES, INSTANCE})
    for key in sorted(config.keys):
        config.delete(key)
    # From the third rule on all waits.
    assert config.keys == {*rules[2:], *RELEASES, INSTANCE}


async def test_a_release_that_is_written_again_does_not_count() -> None:
    config = Config()
    for release in RELEASES:
        config.delete(release)
        config.write(release)
    assert not config.holdback.held
    assert config.keys == ALL


async def test_all_waits_until_its_keys_are_back() -> None:
    config = Config()
    config.delete(*ALL)
    assert config.keys == ALL == config.holdback.held
    config.write(*RELEASES[1:])
    assert config.holdback.held == {RELEASES[0], INSTANCE, RULES}
    config.write(RELEASES[0])
    config.write("more")
    # An instance that did not come back is gone; rules of access may still come.
    assert config.keys == {*RELEASES, RULES, "more"}
    assert config.holdback.held == {RULES}
    config.write(RULES)
    assert not config.holdback.held


async def test_an_operator_accepts_deletions_before_and_after_them() -> None:
    config = Config()
    config.delete(*ALL)
    config.write(ACCEPT_KEY, RULES)
    assert config.keys == {ACCEPT_KEY, RULES}
    config.write(*ALL)
    config.delete(*ALL)
    assert config.keys == {ACCEPT_KEY}
    config.delete(ACCEPT_KEY)
    config.write(*ALL)
    config.delete(*ALL)
    assert config.keys == ALL


async def test_deletions_are_taken_when_their_time_is_over() -> None:
    config = Config(hold_s=0.01)
    config.delete(*ALL)
    assert config.keys == ALL
    await until(lambda: not config.keys)
    assert not config.holdback.held


async def test_the_time_runs_from_the_first_deletion_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdback, "_REMIND_S", 0.001)
    config = Config(hold_s=0.05)
    config.delete(*RELEASES)
    async with asyncio.timeout(60):
        while config.keys:
            config.delete(*ALL & config.keys)
            await asyncio.sleep(0.001)


async def test_nothing_waits_without_a_time_or_if_the_sender_has_checked_it() -> None:
    config = Config(hold_s=0)
    config.delete(*ALL)
    assert not config.keys
    config = Config()
    config.delete(*RELEASES, vetted=True)
    assert config.keys == {INSTANCE, RULES}


async def test_a_rule_that_is_deleted_after_others_were_held_waits_too() -> None:
    rules = [f"{PREFIX}app/metadata/{app}" for app in "abc"]
    config = Config(set(rules))
    config.delete(*rules[:2])
    config.delete(rules[2])
    assert config.keys == set(rules) == config.holdback.held


async def test_an_operators_word_that_is_deleted_with_all_else_does_not_count_later() -> None:
    config = Config({*ALL, ACCEPT_KEY})
    config.delete(*ALL, ACCEPT_KEY)
    assert config.keys == ALL == config.holdback.held
    config.write("more")
    assert config.keys == {*ALL, "more"}
