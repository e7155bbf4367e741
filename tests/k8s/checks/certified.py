"""Does cert-manager make each Secret of TLS, and only with the names of the role whose it is?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from atserving.cli.k8s import secret_of
from atserving.tls import DEFAULT_DOMAIN

from .model import COMPONENTS, Document, Manifests, at, list_at, title
from .secured import role_of, uri_of

ROLES = (*COMPONENTS, "operator")
_ASKED_BY_NAME = ("registry", "evaluator", "etcd")
"""Roles whose clients compare a DNS name: <role>.<domain>."""
_USAGES = {"digital signature", "server auth", "client auth"}


def each_secret_has_one_certificate(manifests: Manifests) -> Iterator[str]:
    """As soon as cert-manager makes any. Two Certificates would replace each other's Secret for ever."""
    made = Counter(each["spec"]["secretName"] for each in manifests.of("Certificate"))
    for secret, count in made.items():
        if count > 1:
            yield f"Certificates: {count} of them make the Secret {secret}"
    for workload, container in manifests.containers if made else ():
        secret = secret_of(role_of(workload, container))
        if secret not in made and any(secret == at(each, "secret", "secretName") for each in workload.volumes):
            yield f"{workload}: no Certificate makes its Secret {secret}"


def certificates_have_the_names_of_one_role(manifests: Manifests) -> Iterator[str]:
    """Whoever has the name of another role is that role for everybody."""
    for certificate in _leaves(manifests):
        spec = certificate["spec"]
        uris, names = list_at(spec, "uris"), list_at(spec, "dnsNames")
        role = str(uris[0]).removeprefix(uri_of("")) if len(uris) == 1 else ""
        kind = role.partition("/")[0]
        if kind not in ROLES or uris != [uri_of(role)]:
            yield f"{title(certificate)}: its uris are {uris}, should be that of one role"
        elif spec["secretName"] != secret_of(role):
            yield f"{title(certificate)}: makes the Secret {spec['secretName']}, should make {secret_of(role)}"
        else:
            for name in names:
                if name.endswith(f".{DEFAULT_DOMAIN}") and name != f"{kind}.{DEFAULT_DOMAIN}":
                    yield f"{title(certificate)}: {name} is a name of another role"
            for name in sorted(_asked(manifests, kind) - set(names)):
                yield f"{title(certificate)}: its dnsNames lack {name}"


def certificates_can_be_shown_by_both_ends(manifests: Manifests) -> Iterator[str]:
    for certificate in _leaves(manifests):
        for usage in sorted(_USAGES - set(list_at(certificate, "spec", "usages"))):
            yield f"{title(certificate)}: its usages lack {usage}"


def keys_are_replaced_but_those_of_authorities(manifests: Manifests) -> Iterator[str]:
    """A new key of an authority would part those who trust the old one from those who have new certificates."""
    for certificate in manifests.of("Certificate"):
        policy, wanted = at(certificate, "spec", "privateKey", "rotationPolicy"), "Always"
        if at(certificate, "spec", "isCA"):
            wanted = "Never"
        if policy != wanted:
            yield f"{title(certificate)}: rotationPolicy is {policy}, should be {wanted}"


def issuers_exist(manifests: Manifests) -> Iterator[str]:
    """A printed Certificate is for the Issuer of the component, which may be applied on its own."""
    issuers = {at(each, "metadata", "name"): each for each in manifests.of("Issuer")}
    authorities = [each["spec"]["secretName"] for each in manifests.of("Certificate") if at(each, "spec", "isCA")]
    for certificate in manifests.of("Certificate"):
        if (name := at(certificate, "spec", "issuerRef", "name")) not in issuers:
            yield f"{title(certificate)}: there is no Issuer {name}"
    for issuer in issuers.values():
        secret = at(issuer, "spec", "ca", "secretName")
        if secret and secret not in authorities:
            yield f"{title(issuer)}: no Certificate of an authority makes its Secret {secret}"


def _leaves(manifests: Manifests) -> list[Document]:
    return [each for each in manifests.of("Certificate") if not at(each, "spec", "isCA")]


def _asked(manifests: Manifests, kind: str) -> set[str]:
    """The names by which clients ask a role."""
    names = {f"{kind}.{DEFAULT_DOMAIN}"} if kind in _ASKED_BY_NAME else set()
    for workload, container in manifests.containers if kind == "etcd" else ():
        if workload.component == "etcd":
            members = (container.flag("initial-cluster", "ETCD") or "").split(",")
            names |= {each.rpartition("//")[2].partition(":")[0] for each in members}
    return names


RULES = (
    each_secret_has_one_certificate,
    certificates_have_the_names_of_one_role,
    certificates_can_be_shown_by_both_ends,
    keys_are_replaced_but_those_of_authorities,
    issuers_exist,
)
