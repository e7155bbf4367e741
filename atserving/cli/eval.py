"""``atserving eval``: call a net of a running mesh with images, and print its answers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from atserving.cli import contexts, service
from atserving.cli.edge_client import MAX_BODY, Answer, EdgeClient, Request, Source, Unreachable
from atserving.cli.eval_output import JsonOutput, Output, TableOutput
from atserving.cli.tables import printable
from atserving.config import is_name
from atserving.errors import StartError

_FAILED, _NOT_FOUND, _UNREACHABLE = 1, 3, 7


def _net(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not all(is_name(part) for part in value.split("/", 1)):
        raise click.BadParameter(f"{value!r} is not APP or APP/VERSION", context, parameter)
    return value


_EDGE = "http://127.0.0.1:8080"


def _edge(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        url = urlsplit(value)
        fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise click.BadParameter(f"{value!r} is not a URL such as http://127.0.0.1:8080", context, parameter)
    return value


def _sources(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Source]:
    if values.count("-") > 1:
        raise click.BadParameter("- may be given once", context, parameter)
    sources = []
    for value in values:
        try:
            sources.append(Source.of(value))
        except OSError as error:
            raise click.BadParameter(f"{value}: {error.strerror}", context, parameter) from None
    return sources


def _json(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """Return the JSON in one form, or an empty text if there is none."""
    if value is None:
        return ""
    try:
        return _dumps(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}", context, parameter) from None


def _params(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """Read ``JSON`` or ``@FILE``."""
    if value is not None and value.startswith("@"):
        try:
            value = Path(value[1:]).read_text()
        except OSError as error:
            raise click.BadParameter(f"{value[1:]}: {error.strerror}", context, parameter) from None
        except UnicodeDecodeError:
            raise click.BadParameter(f"{value[1:]} is not UTF-8", context, parameter) from None
    return _json(context, parameter, value)


def _pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Read ``NAME=VALUE``: a value that is no JSON is a text."""
    pairs = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not name or not separator:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", context, parameter)
        try:
            pairs[name] = json.loads(text)
            _dumps(pairs[name])
        except (ValueError, RecursionError):
            pairs[name] = text
    return pairs


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _png(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() != ".png":
        raise click.BadParameter(f"{value} should end in .png", context, parameter)
    return value


@click.command(
    help="""Call a net with images and print its answers.

    Each FILE is an image, a URL that the net's evaluator can fetch, or - for standard input. Each is a request of its
    own, unless --group is given.
    """,
    epilog="Exit status: 0 all answered, 1 a request failed, 2 a wrong flag or file, 3 no such app or version, "
    "7 the edge cannot be reached.",
)
@click.argument("net", metavar="APP[/VERSION]", callback=_net)
@click.argument("sources", metavar="FILE|URL...", nargs=-1, required=True, callback=_sources)
@contexts.option
@click.option(
    "--edge",
    cls=contexts.OfMesh,
    default=lambda: contexts.chosen().edge or _EDGE,
    show_default=f"the context's, or {_EDGE}",
    callback=_edge,
    metavar="URL",
    help="The URL of the mesh's edge.",
)
@click.option("--params", callback=_params, metavar="JSON|@FILE", help="The params of the requests.")
@click.option(
    "-p",
    "--param",
    "pairs",
    multiple=True,
    callback=_pairs,
    metavar="NAME=VALUE",
    help="One of the params, such as limit=3; JSON or else a text; repeatable.",
)
@click.option("--attribute", callback=_json, metavar="JSON", help="The attribute of each image.")
@click.option("--group", is_flag=True, help="Send all images as one request.")
@click.option(
    "-o",
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Print a table, or JSON with one object on each line.",
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_png,
    metavar="FILE",
    help="Draw the boxes or the mask of the answer on the one image, into this PNG.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the stream of the one answer to this file.",
)
@service.seconds_option("--timeout", 60.0, "Seconds to wait for each answer; 0: without a limit.")
def evaluate(
    net: str,
    sources: Sequence[Source],
    edge: str,
    params: str,
    pairs: dict[str, Any],
    attribute: str,
    group: bool,
    form: str,
    draw: Path | None,
    output: Path | None,
    timeout: float,
) -> None:
    if pairs:
        params = _merged(params, pairs)
    chosen = [tuple(sources)] if group else [(source,) for source in sources]
    requests = [Request(each, group, params, attribute) for each in chosen]
    for request in requests:
        _check_size(request)
    if (draw or output) and len(requests) > 1:
        raise click.UsageError("--draw and --output take one image")
    if draw and (group or sources[0].is_url):
        raise click.UsageError("--draw takes one image from a file or standard input")
    printed: Output = JsonOutput() if form == "json" else TableOutput()
    client = EdgeClient(edge, net, timeout)
    sys.exit(asyncio.run(_ask(client, requests, printed, draw, output)))


def _merged(params: str, pairs: dict[str, Any]) -> str:
    whole = json.loads(params) if params else {}
    if not isinstance(whole, dict):
        raise click.UsageError("-p needs --params to be a JSON object")
    return _dumps(whole | pairs)


def _check_size(request: Request) -> None:
    if request.size > MAX_BODY:
        encoded = "" if request.is_plain else ", as base64 in JSON"
        raise click.UsageError(f"{request.name}: larger than the {MAX_BODY >> 20} MiB that the edge takes{encoded}")


async def _ask(
    client: EdgeClient, requests: Sequence[Request], printed: Output, draw: Path | None, output: Path | None
) -> int:
    """Send the requests and print the answers. Return the exit status. Raises StartError."""
    status = 0
    try:
        async with client, aclosing(client.ask_all(requests)) as answers:
            async for answer in answers:
                fine = answer.code == 0
                saved = output if fine else None
                if saved:
                    _write(saved, _stream(answer))
                printed.add(answer, saved)
                if fine and draw:
                    _write(draw, _drawn(answer))
                if not fine:
                    _tell(answer)
                    status = _FAILED
                if answer.not_found:
                    return _NOT_FOUND
    except Unreachable as error:
        print(f"atserving: {error}", file=sys.stderr)
        return _UNREACHABLE
    finally:
        printed.close()
    return status


def _tell(answer: Answer) -> None:
    """Print the one line of a failed request."""
    code = "" if answer.code is None else f"code {answer.code}, "
    line = f"{answer.request.name}: {answer.message} ({code}x-reqid {answer.reqid})"
    print(f"atserving: {printable(line)}", file=sys.stderr, flush=True)


def _stream(answer: Answer) -> bytes:
    if not isinstance(answer.result, bytes):
        raise StartError(f"{answer.request.name}: the answer is JSON, so --output has no stream to write")
    return answer.result


def _drawn(answer: Answer) -> bytes:
    # Import it here: OpenCV takes longer to load than a small net to answer.
    from atserving.cli import drawing

    return drawing.draw(answer.request.sources[0].read(), answer.result)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from None
