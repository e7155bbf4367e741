"""Resource URIs: which there are, what is shown of them, and whose they are."""

from __future__ import annotations

import base64
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atserving import uris
from atserving.errors import InvalidArgument


@given(st.binary(), st.sampled_from(["", "application/octet-stream", "image/png", "text/plain;charset=utf-8"]))
def test_any_media_type_in_base64_is_data(data: bytes, media_type: str) -> None:
    assert uris.decode_data(f"data:{media_type};base64,{base64.b64encode(data).decode()}") == data


@pytest.mark.parametrize(
    "uri", ["data:,abc", "data:image/png,abc", "data:;base64,a", "data:;base64,ab=c", "data:;base64,ä", "data:"]
)
def test_bad_data_is_refused(uri: str) -> None:
    with pytest.raises(InvalidArgument, match="bad uri"):
        uris.decode_data(uri)


@pytest.mark.parametrize(
    "uri",
    ["file:///etc/passwd", "ftp://h/x", "gopher://h", "//host/x", "host/x", "", "javascript:1", "http://" + "x" * 9000],
)
def test_all_else_is_no_resource(uri: str) -> None:
    with pytest.raises(InvalidArgument):
        uris.scheme(uri)


def test_the_uid_of_a_stored_resource_is_the_callers() -> None:
    assert uris.with_caller("qiniu://1@z0/bucket/a/b?c", 7) == "qiniu://7@z0/bucket/a/b?c"
    assert uris.with_caller("qiniu://z0/bucket/key", 7) == "qiniu://7@z0/bucket/key"
    assert uris.with_caller("qiniu://1@z0/bucket/key", None) == "qiniu://z0/bucket/key"
    assert uris.with_caller("http://1@host/x", 7) == "http://1@host/x"
    for bad in ("qiniu://", "qiniu://z0/bucket", "qiniu://x@z0/bucket/key", "qiniu://1@2@z0/bucket/key"):
        with pytest.raises(InvalidArgument):
            uris.with_caller(bad, 7)


def test_what_is_shown_holds_no_secret_and_no_data() -> None:
    shown = uris.shown("https://user:secret@host/path?token=secret#secret")
    assert shown == "'https://host/path'"
    assert uris.shown("https://user:sec@ret@host/a@b") == "'https://host/a@b'"
    assert "AAAA" not in uris.shown("data:image/png;base64," + "A" * 1000)
    assert len(uris.shown("http://host/" + "x" * 10_000)) < 100


@given(st.text())
def test_rubbish_is_refused_and_nothing_worse(uri: str) -> None:
    for call in (uris.scheme, uris.decode_data, uris.shown, lambda each: uris.with_caller(each, 1)):
        with suppress(InvalidArgument):
            call(uri)
