"""The demo cuts long values of a response before it prints it."""

from __future__ import annotations

import orjson

from atserving.cli.demo import shortened


def test_only_long_values_are_cut() -> None:
    short = '{"a": [1, 2.50, "x"], "b": {"c": []}}'
    assert shortened(short) == short
    assert shortened("0000040 not JSON") == "0000040 not JSON"
    long = orjson.dumps({"uri": "u" * 200, "pts": [[each] for each in range(20)]}).decode()
    assert orjson.loads(shortened(long)) == {
        "uri": "u" * 50 + "... 200 characters",
        "pts": [[0], [1], [2], "... 17 more"],
    }
