"""`atserving up`: run the mesh in the foreground."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from atserving.local import examples
from atserving.local.examples import Example
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh

# Evaluators and Envoy need the other ones.
_CPUS_PER_GATE = 4

_HELP = """\
The mesh serves {apps} at {url}{tls}. Try these in another terminal:

  curl -s {url}/v1/eval/digits -H 'content-type: application/octet-stream' --data-binary @examples/digits/images/7.png
  curl -s {url}/v1/eval/digits/v2 -H 'content-type: application/json' \\
      -d '{{"data": {{"uri": "{files}/digits/images/3.png"}}, "params": {{"limit": 3}}}}'
  curl -s {url}/v1/batch -H 'content-type: application/json' -d '[
      {{"op": "/v1/eval/digits-detect", "data": {{"uri": "{files}/detect/images/1.png"}}}},
      {{"op": "/v1/eval/nothing", "data": {{}}}}]'
  export ATSERVING_SERVER={registry}{certificate}
  {atserving} release list
  {atserving} release split digits v1=9 v2=1
  curl -s {operators}/v1/apps/digits

Operators' API: {operators}, and {registry} as gRPC.
Metrics: prometheus --config.file {directory}/prometheus.yml

{traces}Logs: {directory}/*.log. A process that dies is started again. Ctrl-C stops the mesh."""


@click.command(
    help="Run the mesh in the foreground: etcd, registry, gate, evaluators of the examples and Envoy. With "
    "OTEL_EXPORTER_OTLP_ENDPOINT in the environment, all export traces."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="The edge's port; 0: any free one."
)
@click.option(
    "--gates",
    type=click.IntRange(1, 64),
    default=max(1, len(os.sched_getaffinity(0)) // _CPUS_PER_GATE),
    show_default="one for 4 CPUs",
    help="How many gates share the requests; each uses one CPU.",
)
@click.option(
    "--callers",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="A folder with files of Envoy that say who a caller is; with edge-tls.yaml, the edge offers TLS, too.",
)
@click.option("--tls", is_flag=True, help="Let all processes speak TLS with each other, by a test authority.")
def up(port: int, gates: int, callers: Path | None, tls: bool) -> None:
    run_until_stopped(_up(port, gates, callers, tls))


def _certificate_variables(mesh: Mesh) -> str:
    """Return the rest of a line that lets commands show a certificate."""
    if not mesh.tls:
        return ""
    files = mesh.tls.files
    return f" ATSERVING_TLS_CERT={files.cert} ATSERVING_TLS_KEY={files.key} ATSERVING_TLS_CA={files.ca}"


def tell(line: str) -> None:
    """Print a line about the start of a mesh."""
    print(line, flush=True)


def starting(serves: Sequence[Example]) -> str:
    """Return the line that is printed before a mesh starts."""
    return f"Starting etcd, registry, gate, {len(serves)} evaluators and Envoy ..."


async def _up(port: int, gates: int, callers: Path | None, tls: bool) -> None:
    tell(starting(examples.ALL))
    async with Mesh(port, examples.ALL, gates=gates, callers=callers, tls=tls, tell=tell) as mesh:
        text = _HELP.format(
            apps=", ".join(dict.fromkeys(each.app for each in mesh.serves)),
            url=mesh.url,
            tls=f" and {mesh.tls_url}" if mesh.has_tls else "",
            files=mesh.files_url,
            registry=mesh.registry,
            operators=mesh.operators_url,
            traces=f"Traces: exported to {mesh.export.url}.\n\n" if mesh.export else "",
            directory=mesh.directory,
            certificate=_certificate_variables(mesh),
            atserving=".venv/bin/atserving",
        )
        print(text, flush=True)
        await mesh.watch()
