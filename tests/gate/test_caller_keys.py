"""A gate reads the keys of callers who sign, follows their file, and takes the word of peers that it names alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from atserving.errors import StartError
from gate.caller_keys import CallerKeys
from gate.qiniu_sign import sign

SECRET = "a-secret-key-of-some-length"
KEY = {"access_key": "ak", "secret_key": SECRET, "uid": 42}


def write(path: Path, document: Any) -> Path:
    """Put a new file in the place of another, as an editor or the kubelet does."""
    new = path.with_suffix(".new")
    new.write_text(document if isinstance(document, str) else json.dumps(document))
    os.replace(new, path)
    return path


@pytest.mark.parametrize(
    ("method", "path", "host", "headers", "body", "signature"),
    [
        (
            *("POST", "/v1/eval/digits", "serving.example", {"content-type": "application/json"}),
            *('{"data":{"uri":"http://x/y.png"}}', "7FT1ERV03KOg3znG-dGdH0mqdRA="),
        ),
        (
            *("POST", "/v1/eval/digits/v1?limit=3", "serving.example:8080"),
            *({"content-type": "application/octet-stream"}, "any bytes", "-q5sjlhZq6jmlIOuaptUgNfjG_4="),
        ),
        ("GET", "/health", "serving.example", {}, "", "i8CK1jXJd4GgAQYw4ThxBl9e46g="),
        (
            *("POST", "/v1/batch", "serving.example"),
            {
                "content-type": "application/json",
                "x-qiniu-date": "20261128T031500Z",
                "x-qiniu-bbb": "b",
                "x-qiniu-aaa-cc": "a",
                "x-qiniu-": "none",
                "x-other": "none",
            },
            *("[]", "Aa3lR1ZtAWxHhdUZbDwmrCXehU0="),
        ),
        (
            *("POST", "/v1/eval/数字?q=é", "serving.example", {"content-type": "text/plain; charset=utf-8"}),
            *("ü", "n3IHMchFjGh-ACrcFrdbULNjspw="),
        ),
    ],
)
def test_a_signature_is_that_of_qiniu(
    method: str, path: str, host: str, headers: dict[str, str], body: str, signature: str
) -> None:
    """The signatures are those of Qiniu's SDK for Python, 7.18.0 (QiniuMacAuth)."""
    assert sign(SECRET, method, path, host, headers, body.encode()) == signature.encode()


def test_the_file_is_followed_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", {"keys": [KEY]})
    keys = CallerKeys(path)
    first = keys.key("ak")
    assert first is not None
    assert (first.uid, keys.key("other")) == (42, None)
    write(path, {"keys": [{**KEY, "access_key": "other", "uid": 7}]})
    with structlog.testing.capture_logs() as logged:
        keys.follow()
        keys.follow()
    found = keys.key("other")
    assert found is not None
    assert (found.uid, keys.key("ak")) == (7, None)
    assert [each["event"] for each in logged] == ["caller keys changed"]
    for wrong in ("{", {"keys": [{**KEY, "uid": SECRET}]}):
        write(path, wrong)
        with structlog.testing.capture_logs() as logged:
            keys.follow()
            keys.follow()
        assert [each["event"] for each in logged] == ["caller keys unchanged"]
        assert SECRET not in str(logged)
        assert keys.key("other") == found
    path.unlink()
    keys.follow()
    assert keys.key("other") == found


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("", "truncated"),
        ("[]", "Expected `object`"),
        ({"keys": [{**KEY, "more": 1}]}, "unknown field `more`"),
        ({"keys": [{**KEY, "uid": -1}]}, r"keys\[0\]\.uid"),
        ({"keys": [{**KEY, "uid": "42"}]}, r"keys\[0\]\.uid"),
        ({"keys": [{**KEY, "uid": 10**18}]}, r"keys\[0\]\.uid"),
        ({"keys": [{**KEY, "secret_key": "short"}]}, r"keys\[0\]\.secret_key"),
        ({"keys": [{**KEY, "access_key": "a:b"}]}, r"keys\[0\]\.access_key"),
        ({"keys": [{**KEY, "groups": ["a,b"]}]}, r"keys\[0\]\.groups\[0\]"),
        ({"keys": [{**KEY, "groups": ["a b"]}]}, r"keys\[0\]\.groups\[0\]"),
        ({"keys": [{**KEY, "groups": ["a\n"]}]}, r"keys\[0\]\.groups\[0\]"),
        ({"keys": [KEY, {**KEY, "uid": 7}]}, "two callers have the same access_key"),
        ({"stub": {"networks": ["0.0.0.0/0"]}}, "should be a private network"),
        ({"stub": {"networks": ["8.8.8.0/24"]}}, "should be a private network"),
        ({"stub": {"networks": ["10.0.0.1/8"]}}, "has host bits set"),
        ({"stub": {"networks": ["::/0"]}}, "should be a private network"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, document: Any, reason: str) -> None:
    path = write(tmp_path / "keys.json", document)
    with pytest.raises(StartError, match=reason) as refusal:
        CallerKeys(path)
    assert str(path) in str(refusal.value)
    assert "--caller-keys" in str(refusal.value)
    assert SECRET not in str(refusal.value)
    with pytest.raises(StartError, match=r"can't read .* for --caller-keys"):
        CallerKeys(tmp_path / "none")


@pytest.mark.parametrize(
    ("address", "principal", "taken"),
    [
        ("10.0.3.7", "", True),
        ("::ffff:10.0.3.7", "", True),
        ("fd00::7", "", True),
        ("10.0.4.7", "", False),
        ("8.8.8.8", "spiffe://company.example/portal", True),
        ("8.8.8.8", "spiffe://company.example/portal2", False),
        ("8.8.8.8", "", False),
        ("", "", False),
    ],
)
def test_the_word_of_peers_that_are_named_counts(tmp_path: Path, address: str, principal: str, taken: bool) -> None:
    stub = {"networks": ["10.0.3.0/24", "fd00::/64"], "peers": ["spiffe://company.example/portal"]}
    path = write(tmp_path / "keys.json", {"stub": stub})
    assert CallerKeys(path).takes_word_of(address, principal) is taken
    assert not CallerKeys(write(path, {"keys": [KEY]})).takes_word_of(address, principal)
