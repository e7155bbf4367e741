"""``atserving k8s``: prints manifests of evaluators from the template in ``k8s/evaluator/``."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
import sysconfig
from pathlib import Path
from string import Template
from typing import Any

import click
import jsonpatch
import yaml

from atserving.config import is_name
from atserving.errors import StartError
from atserving.local.examples import ROOT

_TEMPLATE = ("deployment.yaml", "disruption.yaml", "autoscaler.yaml")
_GPU_PATCH = "components/gpu/evaluator.yaml"
# After the grace period, until the pod is killed.
_STOP_S = 10

# A label's value has at most 63 characters. A pod's name is its Deployment's plus 17.
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,44}[a-z0-9])?")
# Refuse a tag that moves: a rollback could get another image.
_IMAGE = re.compile(
    r"[a-z0-9]([\w.-]*[a-z0-9])?(:\d+)?(/[a-z0-9]([\w.-]*[a-z0-9])?)*"
    r"(:(?!latest$)\w[\w.-]*|(:\w[\w.-]*)?@sha256:[0-9a-f]{64})",
    re.A,
)
_CPUS = re.compile(r"(?=.*[1-9])(\d+m|\d+(\.\d{1,3})?)", re.A)
_BYTES = re.compile(r"(?=.*[1-9])\d+(\.\d+)?[MGT]i?", re.A)
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class _Dumper(yaml.SafeDumper):
    """Quotes scalars that some YAML reader takes for a number or a boolean. kubectl's reads more of them: 1e3, y."""


def _written(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if re.match(r"[-+]?\.?\d|[yn]$", text, re.I) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _written)


class _Matching(click.ParamType[str]):
    """A parameter whose text matches a pattern."""

    def __init__(self, name: str, pattern: re.Pattern[str], form: str) -> None:
        self.name = name
        self._pattern = pattern
        self._form = form

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not self._pattern.fullmatch(text):
            self.fail(f"{text!r} {self._form}", param, ctx)
        return text


class _Name(click.ParamType[str]):
    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_name(str(value)):
            self.fail(f"{value!r} should match [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}", param, ctx)
        return str(value)


@click.group(help="Print Kubernetes manifests for kubectl or git.")
def k8s() -> None:
    pass


_replicas = click.IntRange(1, 1000)
_cpus = _Matching("quantity", _CPUS, "is not a number of CPUs such as 2 or 500m")
_bytes = _Matching("quantity", _BYTES, "is not an amount of memory such as 512Mi or 4Gi")
_object = _Matching("name", _DNS_LABEL, "is not a name of lower-case letters, digits and -")


@k8s.command()
@click.argument("app", type=_Name())
@click.argument("version", type=_Name())
@click.option("--replicas", type=_replicas, default=2, show_default=True, help="The minimum number of instances.")
@click.option(
    "--max-replicas", type=_replicas, help="The maximum number of instances.  [default: four times --replicas]"
)
@click.option("--gpu", is_flag=True, help="Give each instance a GPU, and use the image for GPUs.")
@click.option(
    "--image", type=_Matching("image", _IMAGE, "has no tag, or a tag that moves"), help="The image of the evaluator."
)
@click.option("--cpu", type=_cpus, metavar="QUANTITY", help="CPUs of an instance.  [default: 2]")
@click.option(
    "--memory",
    type=_bytes,
    metavar="QUANTITY",
    help="Memory of an instance.  [default: request 1Gi, limit 2Gi; 8Gi with --gpu]",
)
@click.option(
    "--grace",
    type=click.IntRange(1, 3600),
    default=35,
    show_default=True,
    help="Seconds for requests in flight to finish after SIGTERM. Should exceed the app's timeout.",
)
@click.option("--qiniu", type=_object, metavar="SECRET", help="The Secret with the keys for qiniu:// in qiniu.json.")
@click.option("--namespace", type=_object, default="atserving", show_default=True, help="The namespace of the mesh.")
def evaluator(
    app: str,
    version: str,
    replicas: int,
    max_replicas: int | None,
    gpu: bool,
    image: str | None,
    cpu: str | None,
    memory: str | None,
    grace: int,
    qiniu: str | None,
    namespace: str,
) -> None:
    """Print the Deployment, PodDisruptionBudget and HorizontalPodAutoscaler of one version of an app.

    \b
      atserving k8s evaluator digits v1 | kubectl apply -f -
    """
    most = 4 * replicas if max_replicas is None else max_replicas
    if most < replicas:
        raise click.UsageError(f"--max-replicas {most} is less than --replicas {replicas}")
    names = {
        "NAME": _fitted(f"{app}-{version}", _OBJECT_NAME, 46, f"{app}/{version}", unambiguous="-" not in version),
        "APP": app,
        "VERSION": version,
        "APP_LABEL": _fitted(app, _LABEL, 63, app),
        "VERSION_LABEL": _fitted(version, _LABEL, 63, version),
        "GRACE": str(grace),
    }
    deployment, disruption, autoscaler = (_filled(_read(f"evaluator/{each}"), names) for each in _TEMPLATE)
    if gpu:
        deployment = jsonpatch.apply_patch(deployment, _read(_GPU_PATCH))
        memory = memory or "8Gi"
    for each in (deployment, disruption, autoscaler):
        each["metadata"]["namespace"] = namespace
    autoscaler["spec"] |= {"minReplicas": replicas, "maxReplicas": most}
    pod = deployment["spec"]["template"]
    pod["spec"]["terminationGracePeriodSeconds"] = grace + _STOP_S
    _customise(pod, _image(pod, image, gpu), {"cpu": cpu, "memory": memory}, qiniu)
    # The comment tells how to make the file again.
    click.echo(f"# atserving {shlex.join(sys.argv[1:])}".replace("\n", " "))
    documents = (deployment, disruption, autoscaler)
    click.echo(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120), nl=False)


def _image(pod: dict[str, Any], given: str | None, gpu: bool) -> str:
    if given:
        return given
    image = str(pod["spec"]["containers"][0]["image"])
    return image.replace("atserving/evaluator:", "atserving/evaluator-gpu:") if gpu else image


def _customise(pod: dict[str, Any], image: str, resources: dict[str, str | None], qiniu: str | None) -> None:
    (container,) = pod["spec"]["containers"]
    container["image"] = image
    for kind in ("requests", "limits"):
        container["resources"][kind] |= {name: amount for name, amount in resources.items() if amount}
    if qiniu:
        pod["metadata"]["annotations"]["atserving/secrets-from-outside"] = qiniu
        pod["spec"]["volumes"].append({"name": "qiniu", "secret": {"secretName": qiniu}})
        container["volumeMounts"].append({"name": "qiniu", "mountPath": "/etc/qiniu", "readOnly": True})
        container["args"].append("--qiniu=/etc/qiniu/qiniu.json")


def _fitted(text: str, form: re.Pattern[str], longest: int, whole: str, unambiguous: bool = True) -> str:
    """Return ``text`` if it is valid and stands only for ``whole``, else a similar text with a hash of ``whole``."""
    if unambiguous and form.fullmatch(text):
        return text
    near = re.sub(r"[^a-z0-9-]+", "-", text.lower())[: longest - 9].rstrip("-")
    return f"{near}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _filled(value: Any, names: dict[str, str]) -> Any:
    """Replace ``${NAME}`` in a template's value. ``$(NAME)`` is Kubernetes' syntax and stays."""
    match value:
        case str():
            return Template(value).safe_substitute(names)
        case list():
            return [_filled(each, names) for each in value]
        case dict():
            return {key: _filled(each, names) for key, each in value.items()}
        case _:
            return value


def _read(name: str) -> Any:
    """Read a file of ``k8s/`` from the checkout or from the installation (system or user). Raises StartError."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    shares = [Path(sysconfig.get_path("data", each), "share", "atserving") for each in schemes]
    for folder in (ROOT, *shares):
        path = folder / "k8s" / name
        if path.is_file():
            return yaml.safe_load(path.read_text())
    raise StartError(f"k8s/{name} is neither in the checkout nor in the installation")
