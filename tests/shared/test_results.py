"""A net's result is shown to a person in full if it is a built-in net's, and cut, but never wrong, if it is another."""

from __future__ import annotations

import json
import struct
from typing import Any

import cv2
import numpy as np
import pytest

from atserving.cli import results

BOX = [[88, 14], [132, 14], [132, 78], [88, 78]]
FIVE = {"pts": BOX, "index": 6, "class": "five", "score": 0.99793916}


def mask(width: int, height: int) -> str:
    png = cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tobytes()
    uri = results.as_json(png)
    assert isinstance(uri, str)
    return uri


def test_classes_are_a_table() -> None:
    confidences = [
        {"index": 7, "class": "seven", "score": 0.9999953508377075},
        {"index": 10, "class": "x", "score": 4.6e-8},
    ]
    assert results.lines({"confidences": confidences}) == [
        "index  class  score",
        "7      seven  0.999995",
        "10     x      0.000000",
    ]


def test_a_box_is_shown_by_two_corners_and_another_shape_by_all() -> None:
    turned = {**FIVE, "pts": [[50, 0], [100, 50.5], [50, 100], [0, 50]]}
    assert results.lines({"detections": [FIVE, turned]}) == [
        "index  class  score     box",
        "6      five   0.997939  88,14 132,78",
        "6      five   0.997939  50,0 100,50.5 50,100 0,50",
    ]


def test_regions_have_their_color_and_bounds() -> None:
    region = {**FIVE, "pts": [[20, 5], [9, 30], [12, 2]], "color": [128, 0, 255]}
    assert results.lines({"mask": mask(200, 100), "detections": [region]}) == [
        "mask: 200x100 pixels",
        "index  class  score     color    box        outline",
        "6      five   0.997939  #8000ff  9,2 20,30  3 points",
    ]
    assert results.lines({"mask": "none", "detections": []}) == ["mask: 4 characters", "nothing found"]


@pytest.mark.parametrize(
    "result",
    [
        {"detections": [{**FIVE, "landmarks": [1, 2]}]},
        {"detections": [FIVE], "took_ms": 5},
        {"detections": [{**FIVE, "pts": []}]},
        {"detections": [{**FIVE, "pts": [[1, 2, 3]]}]},
        {"detections": [{**FIVE, "pts": [[1e300, 0]]}]},
        {"confidences": "none"},
        {"similarity": 0.5},
        [1, 10**40],
        None,
    ],
    ids=str,
)
def test_another_result_is_indented_json_without_a_loss(result: Any) -> None:
    lines = results.lines(result)
    assert json.loads("\n".join(lines)) == result
    assert "score" not in lines[0]


def test_long_values_of_another_result_are_cut() -> None:
    assert json.loads("".join(results.lines({"text": "t" * 200, "list": [*range(20)]}))) == {
        "text": "t" * 50 + "... 200 characters",
        "list": [0, 1, 2, "... 17 more"],
    }


def test_a_stream_is_shown_by_its_length_and_first_numbers() -> None:
    ten = struct.pack("<10f", *(each + 0.5 for each in range(10)))
    assert results.lines(ten) == ["a stream of 40 bytes, 10 as float32: 0.5 1.5 2.5 3.5 4.5 ..."]
    assert results.lines(ten[:8]) == ["a stream of 8 bytes, 2 as float32: 0.5 1.5"]
    assert results.lines(ten[:7]) == ["a stream of 7 bytes"]
    assert results.lines(b"") == ["a stream of 0 bytes"]


def test_no_line_can_command_a_terminal() -> None:
    evil = "\x1b[2J\x9b31m\r\ud800七"
    for result in ({"confidences": [{"index": 1, "class": evil, "score": 1}]}, {"text": evil}):
        lines = results.lines(result)
        assert all(line.isprintable() for line in lines)
        assert "七" in "".join(lines)


def test_json_is_valid_utf_8_whatever_the_result_holds() -> None:
    value = {"text": "七\ud800\x1b", "number": 10**40}
    text = results.dumps(value)
    assert json.loads(text.encode()) == value
    assert "七" in text
