"""A request of `atserving eval` has the body that the HTTP API documents, and knows its length beforehand."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from atserving.cli.edge_client import Request, Source
from atserving.errors import StartError

URL = 'https://images.example.com/"3".png?a=b'


@pytest.fixture
def image(tmp_path: Path) -> Source:
    (tmp_path / "image").write_bytes(bytes(range(10)))
    return Source.of(str(tmp_path / "image"))


def uri(body: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(body).decode()


def test_lone_file_is_sent_as_it_is(image: Source) -> None:
    request = Request((image,))
    assert (request.is_plain, request.size, request.body()) == (True, 10, bytes(range(10)))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"params": '{"limit": 3}'}, {"params": {"limit": 3}}),
        ({"params": "null"}, {"params": None}),
        ({"attribute": str(10**30)}, {"attribute": 10**30}),
    ],
)
def test_params_or_an_attribute_make_it_json(image: Source, fields: dict[str, str], expected: dict[str, Any]) -> None:
    request = Request((image,), **fields)  # type: ignore[arg-type]
    body = json.loads(request.body())
    assert body["data"].pop("uri") == uri(bytes(range(10)))
    assert {**body.pop("data"), **body} == expected
    assert (request.is_plain, request.size) == (False, len(request.body()))


def test_group_is_an_array_with_an_attribute_for_each_image(image: Source) -> None:
    request = Request((image, Source.of(URL)), group=True, attribute="[1]")
    assert json.loads(request.body()) == {
        "data": [{"uri": uri(bytes(range(10))), "attribute": [1]}, {"uri": URL, "attribute": [1]}]
    }
    assert request.size == len(request.body())


def test_url_is_sent_for_the_evaluator_to_fetch() -> None:
    request = Request((Source.of(URL),))
    assert json.loads(request.body()) == {"data": {"uri": URL}}
    assert request.size == len(request.body())


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"longer than ten"), Path.unlink])
def test_file_that_changes_before_it_is_sent_is_an_error(image: Source, change: Any) -> None:
    change(Path(image.name))
    with pytest.raises(StartError, match="image: "):
        Request((image,)).body()
