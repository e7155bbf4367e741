"""Resource URIs: their schemes, their redacted form, and the caller's uid."""

from __future__ import annotations

import base64
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from atserving import uris
from atserving.errors import InvalidArgument


@given(st.binary(), st.sampled_from(["", "application/octet-stream", "image/png", "text/plain;charset=utf-8"]))
def test_base64_data_of_any_media_type_is_decoded(data: bytes, media_type: str) -> None:
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
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(InvalidArgument):
        uris.scheme(uri)


def test_a_qiniu_uri_gets_the_callers_uid() -> None:
    assert uris.with_caller("qiniu://1@z0/bucket/a/b?c", 7) == "qiniu://7@z0/bucket/a/b?c"
    assert uris.with_caller("qiniu://z0/bucket/key", 7) == "qiniu://7@z0/bucket/key"
    assert uris.with_caller("qiniu://1@z0/bucket/key", None) == "qiniu://z0/bucket/key"
    assert uris.with_caller("http://1@host/x", 7) == "http://1@host/x"
    for bad in ("qiniu://", "qiniu://z0/bucket", "qiniu://x@z0/bucket/key", "qiniu://1@2@z0/bucket/key"):
        with pytest.raises(InvalidArgument):
            uris.with_caller(bad, 7)


@pytest.mark.parametrize(
    ("host", "spellings"),
    [
        (
            "img.example",
            ["http://img.example", "HTTPS://IMG.example:81?1", "http://a:b@img.example#1", "http://img.example.:80/x"],
        ),
        (
            "xn--bcher-kva.example",
            ["http://bücher.example/", "http://BÜCHER。example/", "http://XN--bcher-kva.example"],
        ),
        (
            "xn--strae-oqa.example",
            ["http://straße.example./", "http://STRAßE。example", "http://xn--strae-oqa.example"],
        ),
        ("2001:db8::1", ["http://[2001:db8::1]", "http://[2001:0DB8:0::1]:80/x", "http://u@[2001:db8:0:0:0:0:0:1]?1"]),
        ("127.0.0.1", ["http://127.0.0.1:81?1", "http://[::ffff:127.0.0.1]/", "http://[::FFFF:7f00:1]/"]),
        ("bucket", ["qiniu://z0/bucket/a/b?c", "qiniu://1@z0/bucket/key", "QINIU://2@z?0/bucket/key"]),
        ("", ["http://", "http:///x", "http://[::1/x", "http://[x]/", "http://..ü/", "qiniu://z0"]),
    ],
)
def test_a_host_has_one_name_however_uris_spell_it(host: str, spellings: list[str]) -> None:
    assert {uris.host(each) for each in spellings} == {host}


@given(st.text(st.sampled_from("aA.:@/?#[]1éß。\u00ad\\ \t"), max_size=30))
def test_a_host_is_the_one_that_is_fetched_from(rest: str) -> None:
    uris.host(f"http://{rest}")
    with suppress(ValueError, IndexError):
        name = (URL(f"http://{rest}").raw_host or "").rstrip(".")
        assert ":" in name or uris.host(f"http://{rest}") == name


def test_a_long_host_is_refused_before_it_is_encoded() -> None:
    assert uris.host("http://" + "a" * 253) == "a" * 253
    for name in ("a" * 254, "é" * 8000):
        with pytest.raises(InvalidArgument, match="its host is longer than 253 characters"):
            uris.host(f"http://{name}/x")


def test_a_redacted_uri_holds_no_secret_and_no_data() -> None:
    redacted = uris.redacted("https://user:secret@host/path?token=secret#secret")
    assert redacted == "'https://host/path'"
    assert uris.redacted("https://user:sec@ret@host/a@b") == "'https://host/a@b'"
    assert "AAAA" not in uris.redacted("data:image/png;base64," + "A" * 1000)
    assert len(uris.redacted("http://host/" + "x" * 10_000)) < 100


@given(st.text())
def test_any_text_is_parsed_or_refused(uri: str) -> None:
    for call in (uris.scheme, uris.decode_data, uris.redacted, lambda each: uris.with_caller(each, 1)):
        with suppress(InvalidArgument):
            call(uri)
