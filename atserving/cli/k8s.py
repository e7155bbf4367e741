"""``atserving k8s``: prints manifests from the templates in ``k8s/evaluator/``."""

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
from atserving.tls import EVALUATOR, OPERATOR

_TEMPLATE = ("deployment.yaml", "disruption.yaml")
_ADAPTER, _KEDA = "prometheus-adapter", "keda"
_PROMETHEUS = "http://prometheus.monitoring:9090"
_GPU_PATCH, _TLS_PATCH = "components/gpu/evaluator.yaml", "components/tls/evaluator.yaml"
_TRACING_PATCH = "components/tracing/pods.yaml"
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


class _Role(click.ParamType[str]):
    """A role with a name: an app's evaluators, or an operator."""

    name = "role"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, _, name = str(value).partition("/")
        if kind not in (EVALUATOR, OPERATOR) or not is_name(name):
            self.fail(f"{value!r} should be {EVALUATOR}/APP or {OPERATOR}/NAME", param, ctx)
        return str(value)


_URL = re.compile(r"https?://[\w.-]+(:\d+)?(/[\w./-]*)?", re.A)

_replicas = click.IntRange(1, 1000)
_cpus = _Matching("quantity", _CPUS, "is not a number of CPUs such as 2 or 500m")
_bytes = _Matching("quantity", _BYTES, "is not an amount of memory such as 512Mi or 4Gi")
_object = _Matching("name", _DNS_LABEL, "is not a name of lower-case letters, digits and -")
_namespace = click.option(
    "--namespace", type=_object, default="atserving", show_default=True, help="The namespace of the mesh."
)


@k8s.command()
@click.argument("app", type=_Name())
@click.argument("version", type=_Name())
@click.option(
    "--replicas",
    type=click.IntRange(0, 1000),
    default=2,
    show_default=True,
    help="The minimum number of instances; 0 with --autoscaler keda.",
)
@click.option(
    "--max-replicas",
    type=_replicas,
    help="The maximum number of instances.  [default: four times --replicas, at least 1]",
)
@click.option(
    "--autoscaler",
    type=click.Choice([_ADAPTER, _KEDA]),
    default=_ADAPTER,
    show_default=True,
    help="Scale by a HorizontalPodAutoscaler with metrics of prometheus-adapter, or by a ScaledObject of KEDA.",
)
@click.option(
    "--prometheus",
    type=_Matching("url", _URL, "is not a URL such as http://prometheus.monitoring:9090"),
    metavar="URL",
    help=f"The Prometheus that KEDA asks.  [default: {_PROMETHEUS}]",
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
@click.option("--tls", is_flag=True, help="For a mesh with the component tls, and a Secret for the app's evaluators.")
@click.option("--tracing", is_flag=True, help="For a mesh with the component tracing: export spans.")
@_namespace
def evaluator(
    app: str,
    version: str,
    replicas: int,
    max_replicas: int | None,
    autoscaler: str,
    prometheus: str | None,
    gpu: bool,
    image: str | None,
    cpu: str | None,
    memory: str | None,
    grace: int,
    qiniu: str | None,
    tls: bool,
    tracing: bool,
    namespace: str,
) -> None:
    """Print the Deployment, PodDisruptionBudget and autoscaler of one version of an app.

    \b
      atserving k8s evaluator digits v1 | kubectl apply -f -
    """
    most = max(4 * replicas, 1) if max_replicas is None else max_replicas
    if most < replicas:
        raise click.UsageError(f"--max-replicas {most} is less than --replicas {replicas}")
    if autoscaler != _KEDA:
        if not replicas:
            raise click.UsageError(
                "--replicas 0 needs --autoscaler keda: no other autoscaler starts the first instance"
            )
        if prometheus:
            raise click.UsageError("--prometheus needs --autoscaler keda")
    names = {
        "NAME": _fitted(f"{app}-{version}", _OBJECT_NAME, 46, f"{app}/{version}", unambiguous="-" not in version),
        "APP": app,
        "VERSION": version,
        "APP_LABEL": _fitted(app, _LABEL, 63, app),
        "VERSION_LABEL": _fitted(version, _LABEL, 63, version),
        "GRACE": str(grace),
        "NAMESPACE": namespace,
        "PROMETHEUS": prometheus or _PROMETHEUS,
    }
    deployment, disruption = (_filled(_read(f"evaluator/{each}"), names) for each in _TEMPLATE)
    scaler = (_keda if autoscaler == _KEDA else _horizontal)(names, replicas, most)
    if gpu:
        deployment = jsonpatch.apply_patch(deployment, _read(_GPU_PATCH))
        memory = memory or "8Gi"
    if tls:
        secret = {"SECRET": secret_of(f"{EVALUATOR}/{app}")}
        deployment = jsonpatch.apply_patch(deployment, _filled(_read(_TLS_PATCH), secret))
    if tracing:
        deployment = jsonpatch.apply_patch(deployment, _read(_TRACING_PATCH))
    for each in (deployment, disruption, scaler):
        each["metadata"]["namespace"] = namespace
    pod = deployment["spec"]["template"]
    pod["spec"]["terminationGracePeriodSeconds"] = grace + _STOP_S
    _customise(pod, _image(pod, image, gpu), {"cpu": cpu, "memory": memory}, qiniu)
    _print(deployment, disruption, scaler)


def _horizontal(names: dict[str, str], least: int, most: int) -> Any:
    """Return a HorizontalPodAutoscaler."""
    scaler = _filled(_read("evaluator/autoscaler.yaml"), names)
    scaler["spec"] |= {"minReplicas": least, "maxReplicas": most}
    return scaler


def _keda(names: dict[str, str], least: int, most: int) -> Any:
    """Return a ScaledObject."""
    scaler = _filled(_read("evaluator/scaledobject.yaml"), names)
    spec = scaler["spec"]
    spec |= {"minReplicaCount": least, "maxReplicaCount": most}
    triggers = {each.get("name", each["type"]): each for each in spec["triggers"]}
    if least:
        del triggers["demand"]
    else:
        # No instance, no metrics: that is no failure.
        triggers["load"]["metadata"]["ignoreNullValues"] = "true"
    spec["triggers"] = list(triggers.values())
    return scaler


@k8s.command()
@click.argument("role", type=_Role())
@_namespace
def certificate(role: str, namespace: str) -> None:
    """Print the Certificate of ROLE, from which cert-manager makes a Secret: evaluator/APP or operator/NAME.

    \b
      atserving k8s certificate evaluator/digits | kubectl apply -f -
    """
    names = {"NAME": secret_of(role), "ROLE": role, "KIND": role.partition("/")[0]}
    document = _filled(_read("evaluator/certificate.yaml"), names)
    document["metadata"]["namespace"] = namespace
    _print(document)


def secret_of(role: str) -> str:
    """Return the name of the Secret with the certificate of a role."""
    return _fitted(f"{role.replace('/', '-')}-tls", _DNS_LABEL, 63, role)


def _print(*documents: Any) -> None:
    # The comment tells how to make the file again.
    click.echo(f"# atserving {shlex.join(sys.argv[1:])}".replace("\n", " "))
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
