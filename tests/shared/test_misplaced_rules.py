"""Access rules under an unknown key close the apps that it names; other unknown keys do nothing."""

from __future__ import annotations

import pytest

from atserving.config import CLOSED, PREFIX
from atserving.misplaced_rules import apps_of, consequence, may_hold

RULES = '{"public": false}'


@pytest.mark.parametrize(
    ("key", "apps"),
    [
        ("metadata/digits/", ("digits",)),
        ("metadata//digits", ("digits",)),
        ("metadata/digits ", ("digits",)),
        ("metadata/digits/v1", ("digits", "v1")),
        ("metadta/digits", ("digits",)),
        ("Metadata/digits", ("digits",)),
        ("meta-data/digits", ("digits",)),
        ("digits/metadata", ("digits",)),
        ("metadta/metadata", ("metadata",)),
        ("default/metdata", ("",)),
        ("defalut/metadata", ("",)),
        ("metadata", ()),
        ("metadata/", ()),
        ("metadata/\N{GREEK SMALL LETTER ALPHA}", ()),
    ],
)
@pytest.mark.parametrize("value", [RULES, "{}", '{"limit": 3}', "{"])
def test_a_key_like_that_of_rules_closes_what_it_names_whatever_its_value(
    key: str, apps: tuple[str, ...], value: str
) -> None:
    assert may_hold(f"{PREFIX}app/{key}", value)
    assert apps_of(f"{PREFIX}app/{key}") == apps


@pytest.mark.parametrize(
    ("key", "apps"),
    [
        ("digits", ("digits",)),
        ("acl/digits", ("acl", "digits")),
        ("default", ("",)),
        ("default/acl", ("", "acl")),
        ("digits/default", ("digits",)),
    ],
)
@pytest.mark.parametrize(
    "value", [RULES, CLOSED.to_json(), '{"pubic": false}', '{"owner": {"uid": 1}}', "", b"\xff", "[]"]
)
def test_rules_under_another_key_close_every_app_that_it_may_name(
    key: str, apps: tuple[str, ...], value: str | bytes
) -> None:
    assert may_hold(f"{PREFIX}app/{key}", value)
    assert apps_of(f"{PREFIX}app/{key}") == apps


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("app/quota/digits", '{"per_s": 3}'),
        ("app/quota/metadata-store", '{"per_s": 3}'),
        ("app/digits/quota", "{}"),
        ("app/routng/digits", '{"aliases": {"stable": "v1"}}'),
        ("apps/metadata/digits", RULES),
        ("metadata/digits", RULES),
        ("quota/app/digits", RULES),
        # Known keys, whose values others judge.
        ("app/metadata/digits", "{"),
        ("app/routing/digits", RULES),
        ("app/default/metadata", "{"),
    ],
)
def test_other_keys_close_nothing(key: str, value: str) -> None:
    assert not may_hold(PREFIX + key, value)


def test_long_keys_and_values_cost_little() -> None:
    key = f"{PREFIX}app/" + "a/" * 500_000
    assert may_hold(key, RULES)
    assert len(apps_of(key)) == 8
    assert not may_hold(key, "{" + ",".join(f'"{number}": 1' for number in range(20_000)) + "}")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("metadta/digits", f"{PREFIX}app/metadata/digits; app 'digits' is closed until"),
        ("acl/digits", f"{PREFIX}app/metadata/<app>; app 'acl' and app 'digits' are closed until"),
        ("default/metdata", f"{PREFIX}app/default/metadata; apps without rules of their own are closed until"),
        ("metadata", f"{PREFIX}app/metadata/<app>; delete the key, which closes no app"),
    ],
)
def test_the_operator_reads_the_right_key_and_what_is_closed(key: str, said: str) -> None:
    assert said in consequence(f"{PREFIX}app/{key}")
