"""`atserving convert`: convert a Caffe net to an ONNX file, print a summary, and verify the result on request."""

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

# Smaller nets convert too fast for a progress bar to be useful.
_LARGE_BYTES = 16 * 2**20
_STEPS = ("reading", "layers", "weights", "writing")
_STEP_PARTS = 100


@click.command(short_help="Convert a Caffe net to ONNX.")
@click.argument("prototxt", type=click.Path(path_type=Path))
@click.argument("caffemodel", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="net.onnx", show_default=True, help="The file to write."
)
@click.option(
    "--add-output", "outputs", multiple=True, metavar="BLOB", help="Make this blob an output too. Repeatable."
)
@click.option("--dynamic-size", is_flag=True, help="Keep height and width symbolic, for fully convolutional nets.")
@click.option("--verify", is_flag=True, help="Run on random input; compare with Caffe and OpenCV if installed.")
@click.option("--caffe-python", default="", metavar="PYTHON", help="Interpreter for --verify that can import caffe.")
@click.option("--json", "json_wanted", is_flag=True, help="Print the report as JSON.")
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
    """Convert a Caffe net (PROTOTXT and CAFFEMODEL) to ONNX.

    The exit status is 1 if the net cannot be converted, or if --verify finds an output that differs from Caffe's.
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
        _exit_with(_message(error))
    except MemoryError:
        _exit_with(f"{prototxt.name}: needs more memory than is available")
    except ModuleNotFoundError as error:
        _exit_with(f"--verify needs the package {error.name}")
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
        raise ConversionError("is an input and cannot be the output too", file=output.name)


@contextmanager
def _progress_bar(caffemodel: Path) -> Iterator[Progress]:
    """Show a progress bar on standard error if it is a terminal and the caffemodel is large."""
    shown = sys.stderr.isatty() and caffemodel.is_file() and caffemodel.stat().st_size >= _LARGE_BYTES
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


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename2 or error.filename or 'the output'}: {error.strerror}"
    return str(error)


def _exit_with(message: str) -> None:
    """Print the message as one line and exit with status 1.

    The message can quote names from an untrusted file, so control characters are removed.
    """
    line = " ".join("".join(char if char.isprintable() else " " for char in message).split())
    click.echo(f"atserving convert: {line}", err=True)
    sys.exit(1)
