"""Rules of what manifests refer to: ConfigMaps, Secrets, volumes, claims, accounts, variables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .model import Container, Document, Manifests, Workload, at

# An annotation of a pod template: the Secrets that the operator makes, not these manifests, with commas between.
OUTSIDE = "atserving/secrets-from-outside"

# Where a variable of a container can come from.
_FIELDS = re.compile(
    r"metadata\.(name|namespace|uid)|metadata\.(labels|annotations)\['[^']+'\]"
    r"|spec\.(nodeName|serviceAccountName)|status\.(hostIPs?|podIPs?)"
)
_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")

# A ConfigMap or Secret that something refers to: its kind, its name, and one key, or all.
Reference = tuple[str, str, str | None]


def configs_and_secrets_exist(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for kind, name, key in dict.fromkeys(_references(workload)):
            document = manifests.find(kind, name)
            if document is None:
                if not (kind == "Secret" and name in _outside(workload)):
                    yield f"{workload}: there is no {kind} {name}"
            elif key is not None and key not in keys_of(document):
                yield f"{workload}: {kind} {name} has no key {key}"


def secrets_from_outside_are_used(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        used = {name for kind, name, _ in _references(workload) if kind == "Secret"}
        for name in _outside(workload):
            if name not in used:
                yield f"{workload}: {OUTSIDE} has {name}, which it does not use"
            if manifests.find("Secret", name):
                yield f"{workload}: {OUTSIDE} has {name}, which is among the manifests"


def claims_exist(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for volume in workload.volumes:
            name = at(volume, "persistentVolumeClaim", "claimName")
            if name is not None and not manifests.find("PersistentVolumeClaim", name):
                yield f"{workload}: there is no PersistentVolumeClaim {name}"


def mounts_have_volumes(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        names = _volume_names(workload)
        for container in workload.containers:
            for mount in at(container.spec, "volumeMounts", default=[]):
                if mount["name"] not in names:
                    yield f"{container} mounts volume {mount['name']!r}, which is not declared"


def volumes_have_sources(manifests: Manifests) -> Iterator[str]:
    """Without one a volume is an emptyDir, silently."""
    for workload in manifests.workloads:
        for volume in workload.volumes:
            if volume.keys() == {"name"}:
                yield f"{workload}: volume {volume['name']!r} has no source"


def volumes_are_mounted(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        specs = [each.spec for each in workload.containers]
        mounted = {mount["name"] for spec in specs for mount in at(spec, "volumeMounts", default=[])}
        for name in _volume_names(workload):
            if name not in mounted:
                yield f"{workload}: volume {name!r} is mounted nowhere"


def mounted_keys_exist(manifests: Manifests) -> Iterator[str]:
    """A file that is mounted alone should be in its volume: what is missing would become an empty folder."""
    for workload in manifests.workloads:
        for container in workload.containers:
            for mount in at(container.spec, "volumeMounts", default=[]):
                files = files_of(manifests, workload, mount["name"])
                path = mount.get("subPath")
                if path is not None and files is not None and path not in files:
                    yield f"{container} mounts {path} of volume {mount['name']!r}, which has no such file"


def names_in_pods_are_unique(manifests: Manifests) -> Iterator[str]:
    """Of variables of one name the last counts, silently; the server refuses the others."""
    for workload in manifests.workloads:
        yield from _twice(workload, "container", [each.spec["name"] for each in workload.containers])
        yield from _twice(workload, "volume", _volume_names(workload))
        for container in workload.containers:
            variables, mounts = (at(container.spec, each, default=[]) for each in ("env", "volumeMounts"))
            yield from _twice(container, "variable", [each["name"] for each in variables])
            yield from _twice(container, "mount", [each["mountPath"] for each in mounts])


def accounts_exist(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        name = workload.pod.get("serviceAccountName")
        if name is None:
            yield f"{workload}: has no service account of its own"
        elif not manifests.find("ServiceAccount", name):
            yield f"{workload}: there is no ServiceAccount {name}"


def stateful_sets_have_services(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if workload.kind == "StatefulSet":
            name = at(workload.document, "spec", "serviceName")
            service = manifests.find("Service", str(name))
            if not service:
                yield f"{workload}: there is no Service {name}, which names its pods"
            elif at(service, "spec", "clusterIP") != "None":
                yield f"{workload}: Service {name} names its pods, and is not headless"
            elif not at(service, "spec", "publishNotReadyAddresses"):
                yield f"{workload}: Service {name} names its pods, and needs publishNotReadyAddresses: true"


def variables_are_set(manifests: Manifests) -> Iterator[str]:
    """``$(NAME)`` stays as it is written where no variable above has that name."""
    for workload in manifests.workloads:
        for container in workload.containers:
            known = _from_configs(manifests, container)
            for variable in at(container.spec, "env", default=[]):
                for name in _used(variable.get("value", "")):
                    if name not in known:
                        yield f"{container}: variable {variable['name']} uses $({name}), which is not set before it"
                known.add(variable["name"])
            words = [*at(container.spec, "command", default=[]), *at(container.spec, "args", default=[])]
            for name in dict.fromkeys(name for word in words for name in _used(word)):
                if name not in known:
                    yield f"{container}: its arguments use $({name}), which is not set"


def variables_have_values(manifests: Manifests) -> Iterator[str]:
    """Without one a variable is empty, silently."""
    for workload in manifests.workloads:
        for container in workload.containers:
            for variable in at(container.spec, "env", default=[]):
                if "value" not in variable and not variable.get("valueFrom"):
                    yield f"{container}: variable {variable['name']} has no value"


def fields_exist(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        names = [each.spec["name"] for each in workload.containers]
        for container in workload.containers:
            for variable in at(container.spec, "env", default=[]):
                where = f"{container}: variable {variable['name']}"
                path = at(variable, "valueFrom", "fieldRef", "fieldPath")
                if path is not None and not _FIELDS.fullmatch(path):
                    yield f"{where} comes from field {path}, which a pod does not offer"
                other = at(variable, "valueFrom", "resourceFieldRef", "containerName")
                if other is not None and other not in names:
                    yield f"{where} comes from container {other!r}, which is not there"


def _twice(whose: Workload | Container, what: str, names: list[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{whose}: {what} {name} is there {times} times"


def _outside(workload: Workload) -> list[str]:
    return [name.strip() for name in workload.annotations.get(OUTSIDE, "").split(",") if name.strip()]


def keys_of(document: Document) -> set[str]:
    return {key for field in ("data", "binaryData", "stringData") for key in at(document, field, default={})}


def _references(workload: Workload) -> Iterator[Reference]:
    """What a workload's pods need of ConfigMaps and Secrets; what is optional they do not need."""
    for secret in at(workload.pod, "imagePullSecrets", default=[]):
        yield "Secret", secret["name"], None
    for volume in workload.volumes:
        for source in (volume, *at(volume, "projected", "sources", default=[])):
            yield from _of_source(source)
    for container in workload.containers:
        for each in at(container.spec, "envFrom", default=[]):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in each and not each[field].get("optional"):
                    yield kind, str(each[field].get("name")), None
        for variable in at(container.spec, "env", default=[]):
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                reference = at(variable, "valueFrom", field)
                if reference and not reference.get("optional"):
                    yield kind, str(reference.get("name")), reference["key"]


def _of_source(source: Document) -> Iterator[Reference]:
    """Of a volume, or of a source of a projected one, which spells a Secret's name otherwise."""
    for field, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
        named = source.get(field)
        if named is not None and not named.get("optional"):
            name = str(named.get("name") or named.get("secretName"))
            yield kind, name, None
            for item in named.get("items") or []:
                yield kind, name, item["key"]


def _volume_names(workload: Workload) -> list[str]:
    return [each["name"] for each in workload.volumes] + [at(each, "metadata", "name") for each in workload.claims]


def files_of(manifests: Manifests, workload: Workload, volume: str) -> set[str] | None:
    """The files of a volume; None where the manifests don't say."""
    for each in workload.volumes:
        for field, kind, name in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
            if each["name"] == volume and field in each:
                if each[field].get("items"):
                    return {item["path"] for item in each[field]["items"]}
                document = manifests.find(kind, str(each[field].get(name)))
                return keys_of(document) if document else None
    return None


def _used(text: str) -> list[str]:
    return [match[1] for match in _VARIABLE.finditer(text) if match[1]]


def _from_configs(manifests: Manifests, container: Container) -> set[str]:
    names = set()
    for each in at(container.spec, "envFrom", default=[]):
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            document = manifests.find(kind, at(each, field, "name", default=""))
            names |= {each.get("prefix", "") + key for key in (keys_of(document) if document else ())}
    return names


RULES = (
    configs_and_secrets_exist,
    secrets_from_outside_are_used,
    claims_exist,
    mounts_have_volumes,
    volumes_have_sources,
    volumes_are_mounted,
    mounted_keys_exist,
    names_in_pods_are_unique,
    accounts_exist,
    stateful_sets_have_services,
    variables_are_set,
    variables_have_values,
    fields_exist,
)
