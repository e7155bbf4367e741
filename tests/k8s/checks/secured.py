"""Is every connection between pods TLS, or none? And does each end know itself and the other?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import yaml

from atserving.cli.k8s import secret_of
from atserving.tls import DEFAULT_DOMAIN

from .edge import _bootstrap, _edges, _file
from .finds import file_in, mount_of
from .flags import PROGRAMS
from .listens import grpc_services
from .model import COMPONENTS, Container, Document, Manifests, Workload, at, list_at, title

OWN = {"tls-cert": "tls.crt", "tls-key": "tls.key", "tls-ca": "ca.crt"}
"""The flags of a service for its certificate, and the names of the files in a Secret."""
OF_ETCD = {"etcd-cert": "tls.crt", "etcd-key": "tls.key", "etcd-ca": "ca.crt"}
"""The flags of a registry for etcd."""
ETCD = {
    **{"cert-file": "tls.crt", "key-file": "tls.key", "trusted-ca-file": "ca.crt"},
    **{"peer-cert-file": "tls.crt", "peer-key-file": "tls.key", "peer-trusted-ca-file": "ca.crt"},
}
"""The flags of etcd for its certificate."""
ETCD_LETS_IN = {
    "client-cert-auth": "true",
    "client-cert-allowed-hostname": f"registry.{DEFAULT_DOMAIN}",
    "peer-client-cert-auth": "true",
    "peer-cert-allowed-hostname": f"etcd.{DEFAULT_DOMAIN}",
}
"""The flags of etcd that say whom it lets in. The authority that it trusts signs the certificates of all roles."""

_URLS = ("listen-client-urls", "listen-peer-urls", "advertise-client-urls", "initial-advertise-peer-urls")
_FIELDS = {"certificate_chain": "tls.crt", "private_key": "tls.key", "trusted_ca": "ca.crt"}
_OWN, _PEER = "tls_certificate_sds_secret_configs", "validation_context_sds_secret_config"


def all_connections_are_secured_or_none(manifests: Manifests) -> Iterator[str]:
    """Plain text at one end is not understood at the other, or is, unnoticed."""
    if has_tls(manifests):
        for workload, container in manifests.containers:
            for what in _in_plain_text(manifests, workload, container):
                yield f"{container} has {what}, in a mesh with TLS"


def certificates_come_from_the_secret_of_the_role(manifests: Manifests) -> Iterator[str]:
    """A kubelet replaces the files of a Secret that is mounted as a whole, and all at once."""
    for workload, container in manifests.containers:
        secret = secret_of(role_of(workload, container))
        for flag, name in files_of(workload, container).items():
            path = container.flag(flag, _prefix(workload))
            if path and _origin(workload, container, path) != (secret, name):
                yield f"{container}: --{flag} is {path}, should be {name} of the Secret {secret}"


def etcd_lets_in_members_and_registries(manifests: Manifests) -> Iterator[str]:
    for workload, container in manifests.containers:
        is_secured = workload.component == "etcd" and files_of(workload, container)
        for flag, wanted in ETCD_LETS_IN.items() if is_secured else ():
            if (given := container.flag(flag, "ETCD")) != wanted:
                yield f"{container}: --{flag} is {given}, should be {wanted}"


def the_edge_asks_gates_and_registries(manifests: Manifests) -> Iterator[str]:
    """Envoy shows its own certificate, and takes that of one role from each cluster."""
    for workload, container in _edges(manifests):
        for cluster in _clusters(manifests, workload, container):
            context = at(cluster, "transport_socket", "typed_config", "common_tls_context")
            if not context:
                continue
            where = f"{container}: its cluster {cluster['name']}"
            shown = [_secret(manifests, workload, container, each) for each in list_at(context, _OWN)]
            chain = at(shown[0] if shown else None, "tls_certificate")
            peer = at(_secret(manifests, workload, container, at(context, _PEER)), "validation_context")
            for part, (field, name) in product((chain, peer), _FIELDS.items()):
                path = at(part, field, "filename")
                if path and _origin(workload, container, path) != (secret_of("envoy"), name):
                    yield f"{where} has {field} {path}, should have {name} of the Secret {secret_of('envoy')}"
            if not chain:
                yield f"{where} is shown no certificate"
            wanted = [{"san_type": "URI", "matcher": {"exact": uri_of(cluster["name"])}}]
            if not at(peer, "trusted_ca") or list_at(peer, "match_typed_subject_alt_names") != wanted:
                yield f"{where} may have other names than {uri_of(cluster['name'])}"


def services_say_what_is_spoken(manifests: Manifests) -> Iterator[str]:
    """Those between two pods look at the protocol that a Service names."""
    wanted = "https" if has_tls(manifests) else "kubernetes.io/h2c"
    for service in grpc_services(manifests):
        for port in list_at(service, "spec", "ports"):
            if port.get("appProtocol", wanted) != wanted:
                yield f"{title(service)}: its port {port['port']} says {port['appProtocol']}, should say {wanted}"


def has_tls(manifests: Manifests) -> bool:
    """Whether any end of a connection between pods has TLS."""
    return any(
        any(container.flag(flag, _prefix(workload)) for flag in files_of(workload, container))
        or any("transport_socket" in each for each in _clusters(manifests, workload, container))
        for workload, container in manifests.containers
    )


def files_of(workload: Workload, container: Container) -> dict[str, str]:
    """Return the flags of a container for files of TLS, each with the file's name in a Secret."""
    match workload.component:
        case "registry":
            return {**OWN, **OF_ETCD}
        case "gate" | "evaluator":
            return OWN
        case "etcd" if any(_url(container, flag).startswith("https:") for flag in _URLS):
            return ETCD
        case _:
            return {}


def role_of(workload: Workload, container: Container) -> str:
    """Return the role that a container has for others."""
    return f"evaluator/{container.flag('app')}" if workload.component == "evaluator" else str(workload.component)


def uri_of(role: str) -> str:
    return f"spiffe://{DEFAULT_DOMAIN}/{role}"


def _in_plain_text(manifests: Manifests, workload: Workload, container: Container) -> Iterator[str]:
    if workload.component in PROGRAMS and container.flag("insecure") is not None:
        yield "--insecure"
    for flag in files_of(workload, container):
        if container.flag(flag, _prefix(workload)) is None:
            yield f"no --{flag}"
    for flag in (*_URLS, "initial-cluster") if workload.component == "etcd" else ():
        if "http://" in _url(container, flag):
            yield f"http:// in --{flag}"
    for cluster in _clusters(manifests, workload, container):
        if at(cluster, "transport_socket", "name") != "envoy.transport_sockets.tls":
            yield f"plain text to its cluster {cluster['name']}"


def _prefix(workload: Workload) -> str:
    return "ETCD" if workload.component == "etcd" else "ATSERVING"


def _url(container: Container, flag: str) -> str:
    """The value of a flag, with the container's own variables in it."""
    value = container.flag(flag, "ETCD") or ""
    for each in container.variables:
        value = value.replace(f"$({each['name']})", str(each.get("value", "")))
    return value


def _origin(workload: Workload, container: Container, path: str) -> tuple[str, str] | None:
    """The Secret that a file is from, and its name there."""
    mount = mount_of(container, path)
    for volume in workload.volumes:
        if mount and volume["name"] == mount["name"] and "secret" in volume and not volume["secret"].get("items"):
            return str(volume["secret"].get("secretName")), file_in(mount, path)
    return None


def _clusters(manifests: Manifests, workload: Workload, container: Container) -> list[Document]:
    """Envoy's clusters of other pods; none for other components."""
    parts = _bootstrap(manifests, workload, container) if workload.component == "envoy" else []
    clusters = [each for part in parts for each in list_at(part, "static_resources", "clusters")]
    return [each for each in clusters if each["name"] in COMPONENTS]


def _secret(manifests: Manifests, workload: Workload, container: Container, config: Document | None) -> Document | None:
    """A secret of Envoy's, from the file that the bootstrap names."""
    path = at(config, "sds_config", "path_config_source", "path")
    read = yaml.safe_load(_file(manifests, workload, container, str(path)) or "")
    return next((each for each in list_at(read, "resources") if each.get("name") == at(config, "name")), None)


RULES = (
    all_connections_are_secured_or_none,
    certificates_come_from_the_secret_of_the_role,
    etcd_lets_in_members_and_registries,
    the_edge_asks_gates_and_registries,
    services_say_what_is_spoken,
)
