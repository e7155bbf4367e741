"""A gate knows a caller by the headers that Envoy sets, and compares them with the rules of the app."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from atserving.config import AppMetadata, Owner
from atserving.errors import PermissionDenied, StartError, Unauthenticated
from atserving.http2_stream import Headers
from gate.admission import Caller, admit
from gate.callers import Callers, read_keys

KEYS = [b"k" * 32, b"l" * 32]
NONE = AppMetadata()


def headers(**values: str) -> Headers:
    return Headers([(name.replace("_", "-").encode(), value.encode()) for name, value in values.items()])


@pytest.mark.parametrize("key", ["k" * 32, "l" * 32])
def test_a_caller_is_who_the_edge_says(key: str) -> None:
    caller = Callers(KEYS).of(headers(x_serving_uid="42", x_serving_groups="a, b", x_serving_edge=key))
    assert (caller.uid, set(caller.groups), caller.proven) == (42, {"a", "b"}, True)


@pytest.mark.parametrize("shown", [{}, {"x_serving_edge": ""}, {"x_serving_edge": "k" * 31}])
def test_without_the_key_nobody_is_known(shown: dict[str, str]) -> None:
    assert Callers(KEYS).of(headers(x_serving_uid="42", **shown)) == Caller()
    assert Callers().of(headers(x_serving_uid="42", x_serving_edge="")) == Caller()


@pytest.mark.parametrize("uid", ["", "x", "-1", "4 2", "1" * 19, "\u0664"])
def test_a_uid_is_a_number(uid: str) -> None:
    caller = Callers(KEYS).of(headers(x_serving_uid=uid, x_serving_edge="k" * 32))
    assert (caller.uid, caller.proven) == (None, True)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("", set()),
        ("a", {"a"}),
        ("a b,c", {"a", "b", "c"}),
        ("abcd", {"abcd"}),
        (base64.b64encode(b'["a b","c",3]').decode(), {"a b", "c"}),
        (base64.urlsafe_b64encode('["\u00ff\u00fe?>"]'.encode()).decode().rstrip("="), {"\u00ff\u00fe?>"}),
        (base64.b64encode(b"[]").decode(), set()),
    ],
)
def test_groups_are_a_text_or_a_list(groups: str, expected: set[str]) -> None:
    assert Caller(raw_groups=groups.encode()).groups == expected


@pytest.mark.parametrize(
    ("own", "default", "caller", "refusal"),
    [
        (NONE, NONE, Caller(), None),
        (AppMetadata(group_whitelist=("a",)), NONE, Caller(), Unauthenticated),
        (AppMetadata(group_whitelist=("a",)), NONE, Caller(None, b"b a", proven=True), None),
        (AppMetadata(group_whitelist=("a",)), NONE, Caller(7, b"b", proven=True), PermissionDenied),
        (AppMetadata(group_whitelist=()), NONE, Caller(7, b"", proven=True), PermissionDenied),
        (AppMetadata(owner=Owner(uid=7)), NONE, Caller(None, b"a", proven=True), PermissionDenied),
        (AppMetadata(public=False), AppMetadata(group_whitelist=("a",)), Caller(None, b"a", proven=True), None),
        (
            AppMetadata(group_whitelist=("b",)),
            AppMetadata(group_whitelist=("a",)),
            Caller(None, b"a", proven=True),
            PermissionDenied,
        ),
        (AppMetadata(public=False, user_whitelist=()), NONE, Caller(7, b"a", proven=True), PermissionDenied),
    ],
)
def test_rules_name_users_and_groups(
    own: AppMetadata, default: AppMetadata, caller: Caller, refusal: type[Exception] | None
) -> None:
    if refusal is None:
        admit(caller, "app", own, default)
    else:
        with pytest.raises(refusal):
            admit(caller, "app", own, default)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "at least 32"), ("short\n", "at least 32"), (f"{'k' * 32}\nx", "at least 32")]
)
def test_a_short_key_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(StartError, match=reason):
        read_keys(path)
    path.write_text(f"{'k' * 32}\n\n {'l' * 32} \n")
    assert read_keys(path) == KEYS
    with pytest.raises(StartError, match="can't read"):
        read_keys(tmp_path / "none")
