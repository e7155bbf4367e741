"""`atserving convert`: a Caffe net to a file for onnxruntime, with what it is and, on request, whether it is right."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from . import convert as convert_net
from .convert import Progress
from .errors import ConversionError
from .report import as_json, as_text
from .saving import check_target, write
from .summary import summarize
from .verify import verify as verify_model

# A net of fewer bytes is converted before a bar could be read.
_LARGE = 16 * 2**20
_STEPS = ("reading", "layers", "weights", "writing")
_STEP_PARTS = 100


@click.command(short_help="Convert a Caffe net to ONNX.")
@click.argument("prototxt", type=click.Path(path_type=Path))
@click.argument("caffemodel", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="net.onnx", show_default=True, help="The file."
)
@click.option("--add-output", "outputs", multiple=True, metavar="BLOB", help="A further blob to have as an output.")
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open, for fully convolutional nets.")
@click.option("--verify", is_flag=True, help="Run it on random input; compare with Caffe and OpenCV, where they are.")
@click.option("--caffe-python", default="", metavar="PYTHON", help="An interpreter that can import caffe.")
@click.option("--json", "json_wanted", is_flag=True, help="Report in JSON.")
def convert(
    prototxt: Path,
    caffemodel: Path,
    output: Path,
    outputs: tuple[str, ...],
    dynamic_size: bool,
    verify: bool,
    caffe_python: str,
    json_wanted: bool,
) -> None:
    """Convert a Caffe net, its PROTOTXT and CAFFEMODEL, to ONNX.

    The exit status is 1 if it cannot be converted, or if --verify finds an output that is not Caffe's.
    """
    try:
        _refuse_overwriting(output, prototxt, caffemodel)
        with _progress_bar(caffemodel) as progress:
            model = convert_net(prototxt, caffemodel, outputs=outputs, dynamic_size=dynamic_size, progress=progress)
            progress("writing", 0, 1)
            write(model, output)
            progress("writing", 1, 1)
        verification = verify_model(model, prototxt, caffemodel, caffe_python) if verify else None
    except (ConversionError, OSError) as error:
        _stop(_said(error))
    except MemoryError:
        _stop(f"{prototxt.name}: needs more memory than there is")
    except ModuleNotFoundError as error:
        _stop(f"--verify needs the package {error.name}")
    summary = summarize(model)
    if json_wanted:
        click.echo(json.dumps(as_json(output, summary, verification), indent=2))
    else:
        click.echo(as_text(output, summary, verification))
    if verification is not None and not verification.agrees:
        sys.exit(1)


def _refuse_overwriting(output: Path, *inputs: Path) -> None:
    check_target(output)
    if any(output.exists() and path.exists() and output.samefile(path) for path in inputs):
        raise ConversionError("is to be converted, and cannot be the output too", file=output.name)


@contextmanager
def _progress_bar(caffemodel: Path) -> Iterator[Progress]:
    """A bar on the terminal for a net that is large enough; elsewhere nothing."""
    shown = sys.stderr.isatty() and caffemodel.is_file() and caffemodel.stat().st_size >= _LARGE
    with click.progressbar(
        length=len(_STEPS) * _STEP_PARTS,
        label=caffemodel.name,
        file=sys.stderr,
        hidden=not shown,
        item_show_func=lambda step: step,
        show_pos=False,
    ) as bar:

        def progress(step: str, done: int, of: int) -> None:
            position = _STEPS.index(step) * _STEP_PARTS + _STEP_PARTS * done // max(of, 1)
            bar.update(position - bar.pos, step)

        yield progress


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename2 or error.filename or 'the output'}: {error.strerror}"
    return str(error)


def _stop(message: str) -> None:
    """One line, of characters that do a terminal no harm whatever the file holds."""
    line = " ".join("".join(char if char.isprintable() else " " for char in message).split())
    click.echo(f"atserving convert: {line}", err=True)
    sys.exit(1)
