"""The demo draws results on pictures. The results are invented, so that the tests can compute the pixels."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from atserving.cli import drawing
from atserving.errors import StartError

Pixels = NDArray[np.uint8]

GROUND = (40, 20, 10)
WIDTH, HEIGHT, SCALE = 192, 96, 4


def png(pixels: Pixels) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def pixels(image: bytes) -> Pixels:
    decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded.astype(np.uint8)


def ground(width: int = WIDTH, height: int = HEIGHT) -> Pixels:
    return np.full((height, width, 3), GROUND, np.uint8)


def box(left: int, top: int, right: int, bottom: int, index: int = 3) -> dict[str, Any]:
    pts = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"pts": pts, "index": index, "class": "three", "score": 0.75}


def boxes_on(image: Pixels, *detections: dict[str, Any]) -> Pixels:
    return pixels(drawing.boxes(png(image), {"detections": list(detections)}))


def test_drawing_without_detections_only_enlarges_a_small_picture() -> None:
    assert (boxes_on(ground()) == ground(WIDTH * SCALE, HEIGHT * SCALE)).all()
    assert (boxes_on(ground(1000, 700)) == ground(1000, 700)).all()


def test_box_colours_its_edges_and_nothing_within() -> None:
    canvas = boxes_on(ground(), box(50, 40, 120, 80))
    left, top, right, bottom = 50 * SCALE, 40 * SCALE, 120 * SCALE, 80 * SCALE
    color = drawing.color_of(3)
    for edge in (
        canvas[top, left:right],
        canvas[bottom, left:right],
        canvas[top:bottom, left],
        canvas[top:bottom, right],
    ):
        assert (edge == color).all()
    assert (canvas[top + 3 : bottom - 3, left + 3 : right - 3] == GROUND).all()
    assert (canvas[bottom + 3 :] == GROUND).all()
    assert (canvas[:, right + 3 :] == GROUND).all()


@pytest.mark.parametrize(("left", "top"), [(50, 40), (0, 0), (WIDTH - 6, 0), (WIDTH - 6, 60)])
def test_label_stands_above_the_box_or_where_it_has_room(left: int, top: int) -> None:
    canvas = boxes_on(ground(), box(left, top, left + 5, top + 30))
    color = drawing.color_of(3)
    rows, columns = (canvas == color).all(axis=2).nonzero()
    assert rows.min() == 0 if top == 0 else rows.min() < top * SCALE - 15
    label = canvas[rows.min() : rows.min() + 15, columns.min() : columns.max() + 1]
    assert label.shape[1] > 5 * SCALE * 3
    assert (label == color).all(axis=2).mean() > 0.5
    assert (label.max(axis=2) < 100).sum() > 50


def test_classes_have_distinct_colours() -> None:
    colors = [drawing.color_of(index) for index in range(20)]
    assert len(set(colors)) == len(colors)
    assert all(max(color) == 255 and min(color) > 80 for color in colors)


def test_highest_score_covers_the_other_boxes() -> None:
    canvas = boxes_on(ground(), box(50, 40, 120, 80, index=1), box(50, 40, 120, 90, index=2))
    assert tuple(canvas[60 * SCALE, 50 * SCALE]) == drawing.color_of(1)
    assert tuple(canvas[85 * SCALE, 50 * SCALE]) == drawing.color_of(2)


def masked(*regions: tuple[int, int, int, int]) -> Pixels:
    """Draw a mask with rectangular regions in red (200) on the ground."""
    colors = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    detections = []
    for left, top, right, bottom in regions:
        colors[top : bottom + 1, left : right + 1] = (0, 0, 200)
        detections.append({**box(left, top, right, bottom), "color": [200, 0, 0]})
    uri = "data:image/png;base64," + base64.b64encode(png(colors)).decode()
    return pixels(drawing.mask(png(ground()), {"mask": uri, "detections": detections}))


def test_mask_tints_only_its_own_pixels() -> None:
    canvas = masked((50, 40, 120, 80))
    assert canvas.shape == (HEIGHT * SCALE, WIDTH * SCALE, 3)
    within = canvas[41 * SCALE + 2 : 80 * SCALE - 2, 51 * SCALE + 2 : 120 * SCALE - 2]
    assert (within == within[0, 0]).all()
    blue, green, red = within[0, 0].tolist()
    assert GROUND[2] < red < 200
    assert blue < GROUND[0]
    assert green < GROUND[1]
    assert (canvas[81 * SCALE :] == GROUND).all()
    assert (canvas[:, 121 * SCALE :] == GROUND).all()


def test_outline_follows_the_centres_of_a_regions_outermost_pixels_in_white() -> None:
    canvas = masked((50, 40, 120, 60), (20, 75, 40, 90))
    for left, top, right, bottom in ((50, 40, 120, 60), (20, 75, 40, 90)):
        x1, y1, x2, y2 = (part * SCALE + SCALE // 2 for part in (left, top, right, bottom))
        for edge in (canvas[y2, x1:x2], canvas[y1:y2, x1], canvas[y1:y2, x2]):
            assert (edge == 255).all()


def test_mask_of_background_alone_only_enlarges_the_picture() -> None:
    assert (masked() == ground(WIDTH * SCALE, HEIGHT * SCALE)).all()


@pytest.mark.parametrize("result", [{"confidences": []}, {"detections": [{"pts": []}]}, [1], None, b"stream"], ids=str)
def test_a_result_without_boxes_and_mask_is_not_drawn(result: Any) -> None:
    with pytest.raises(StartError, match="no boxes and no mask"):
        drawing.draw(png(ground()), result)


def test_boxes_with_more_fields_are_drawn() -> None:
    each = box(50, 40, 120, 80)
    drawn = drawing.draw(png(ground()), {"detections": [{**each, "landmarks": [[1, 2]]}], "took_ms": 5})
    assert (pixels(drawn) == boxes_on(ground(), each)).all()


def test_mask_of_another_size_covers_the_whole_picture() -> None:
    uri = "data:image/png;base64," + base64.b64encode(png(np.full((5, 7, 3), 200, np.uint8))).decode()
    drawn = pixels(drawing.draw(png(ground()), {"mask": uri, "detections": []}))
    assert (drawn == drawn[0, 0]).all()
    assert (drawn != GROUND).all()


@pytest.mark.parametrize("uri", ["none", "data:image/png;base64,!", "data:image/png;base64,", "data:x;base64,eHl6"])
def test_broken_picture_or_mask_is_an_error(uri: str) -> None:
    with pytest.raises(StartError, match="the mask"):
        drawing.draw(png(ground()), {"mask": uri, "detections": []})
    with pytest.raises(StartError, match="the picture"):
        drawing.draw(uri.encode(), {"detections": []})
