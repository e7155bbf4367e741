"""``labels.csv`` gives class names by index; an error in it is one message that names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from atserving.errors import StartError
from evaluator.nets import labels

FORM = "a class index and a name, such as 0,cat"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0,zero\n1,one\n", {0: "zero", 1: "one"}),
        ('\ufeff2,"cat, big"\r\n\r\n0,"say ""hi"""', {2: "cat, big", 0: 'say "hi"'}),
        ("7,cat, unquoted\n 8 , dog ", {7: "cat, unquoted", 8: "dog"}),
        ("1,\u732b\n", {1: "\u732b"}),
        ("", {}),
    ],
)
def test_labels_are_read_by_index(text: str, names: dict[int, str], tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert labels.read(path) == names


def test_release_without_a_file_has_no_labels() -> None:
    assert labels.read(None) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"index,name\n0,zero\n",
            f"labels.csv: line 1 is a header, 'index,name': remove it; each line should be {FORM}",
        ),
        (b"zero\none\n", f"labels.csv: line 1 is 'zero', should be {FORM}"),
        (b"cat,0\n", f"labels.csv: line 1 is 'cat,0', should be {FORM}"),
        (b"0,zero\n\nindex,name\n", f"labels.csv: line 3 is 'index,name', should be {FORM}"),
        (b"0,zero\n1\n", f"labels.csv: line 2 is '1', should be {FORM}"),
        (b"-1,zero\n", f"labels.csv: line 1 is '-1,zero', should be {FORM}"),
        (b"9" * 5000 + b",x\n", f"labels.csv: line 1 is '{'9' * 80}', should be {FORM}"),
        (b"0,zero\n1,one\n0,none\n", "labels.csv: line 3 names class 0 again, after line 1"),
        (b"0,z\xe9ro\n", "labels.csv is not UTF-8 text"),
        (b"0," + b"x" * 200_000, "labels.csv: line 1: field larger than field limit (131072)"),
    ],
)
def test_error_names_the_line_and_the_form(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(data)
    with pytest.raises(StartError) as error:
        labels.read(path)
    assert str(error.value) == message
