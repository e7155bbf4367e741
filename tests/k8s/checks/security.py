"""Rules of privilege: the restricted Pod Security Standard, control by control, and a little more.

The controls are those of the levels baseline and restricted in
https://kubernetes.io/docs/concepts/security/pod-security-standards/. A container's setting goes before its pod's.
"""

from __future__ import annotations

from collections.abc import Iterator

from .model import Container, Document, Manifests, Workload, at

VOLUME_TYPES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
SYSCTLS = (
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
)
SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
CONFINED = ("RuntimeDefault", "Localhost")
ENFORCE = "pod-security.kubernetes.io/enforce"

_APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"


def namespace_enforces_restricted(manifests: Manifests) -> Iterator[str]:
    for namespace in manifests.of("Namespace"):
        level = at(namespace, "metadata", "labels", ENFORCE)
        if level != "restricted":
            yield f"Namespace/{at(namespace, 'metadata', 'name')}: {ENFORCE} is {level}, should be restricted"


def no_host_namespaces(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if workload.pod.get(field):
                yield f"{workload}: {field} is not allowed"


def no_host_process(manifests: Manifests) -> Iterator[str]:
    for where, context in _contexts(manifests):
        if at(context, "windowsOptions", "hostProcess"):
            yield f"{where}: hostProcess is not allowed"


def not_privileged(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        if at(container.spec, "securityContext", "privileged"):
            yield f"{container} is privileged"


def no_host_ports(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        for port in container.ports:
            if port.get("hostPort"):
                yield f"{container} takes port {port['hostPort']} of its host"


def no_other_hosts_probed(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        probes = [container.spec.get(each) for each in ("startupProbe", "readinessProbe", "livenessProbe")]
        hooks = [at(container.spec, "lifecycle", each) for each in ("postStart", "preStop")]
        for each in (*probes, *hooks):
            host = at(each, "httpGet", "host") or at(each, "tcpSocket", "host")
            if host:
                yield f"{container} has host {host} asked by a probe or a hook"


def volumes_are_allowed(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for volume in workload.volumes:
            for kind in (each for each in volume if each not in ("name", *VOLUME_TYPES)):
                yield f"{workload}: volume {volume['name']!r} is a {kind}, which is not allowed"


def capabilities_are_dropped(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        capabilities = at(container.spec, "securityContext", "capabilities", default={})
        if "ALL" not in at(capabilities, "drop", default=[]):
            yield f"{container} does not drop ALL capabilities"
        for name in at(capabilities, "add", default=[]):
            if name != "NET_BIND_SERVICE":
                yield f"{container} has capability {name}"


def no_privilege_escalation(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        if at(container.spec, "securityContext", "allowPrivilegeEscalation") is not False:
            yield f"{container} should have allowPrivilegeEscalation: false"


def not_root(manifests: Manifests) -> Iterator[str]:
    for workload, container in _containers(manifests):
        if _effective(workload, container, "runAsNonRoot") is not True:
            yield f"{container} should have runAsNonRoot: true"


def users_are_numbered(manifests: Manifests) -> Iterator[str]:
    """An image whose user is root, or has a name only, does not start with runAsNonRoot."""
    for workload, container in _containers(manifests):
        if _effective(workload, container, "runAsUser") is None:
            yield f"{container} should have runAsUser, a number"


def no_user_0(manifests: Manifests) -> Iterator[str]:
    for where, context in _contexts(manifests):
        if at(context, "runAsUser") == 0:
            yield f"{where}: runAsUser is 0"


def seccomp_confines(manifests: Manifests) -> Iterator[str]:
    for workload, container in _containers(manifests):
        kind = at(_effective(workload, container, "seccompProfile"), "type")
        if kind not in CONFINED:
            yield f"{container} has seccomp profile {kind}, should have one of {', '.join(CONFINED)}"


def apparmor_confines(manifests: Manifests) -> Iterator[str]:
    for where, context in _contexts(manifests):
        kind = at(context, "appArmorProfile", "type")
        if kind is not None and kind not in CONFINED:
            yield f"{where}: AppArmor profile {kind} is not allowed"
    for workload in manifests.workloads:
        for key, value in workload.annotations.items():
            if key.startswith(_APPARMOR_ANNOTATION) and not value.startswith(("runtime/default", "localhost/")):
                yield f"{workload}: annotation {key}: {value} is not allowed"


def selinux_confines(manifests: Manifests) -> Iterator[str]:
    for where, context in _contexts(manifests):
        options = at(context, "seLinuxOptions", default={})
        if options.get("type", "") not in SELINUX_TYPES or options.get("user") or options.get("role"):
            yield f"{where}: its SELinux options are not allowed"


def proc_is_masked(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        mount = at(container.spec, "securityContext", "procMount", default="Default")
        if mount != "Default":
            yield f"{container} has procMount {mount}"


def sysctls_are_safe(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for each in at(workload.pod, "securityContext", "sysctls", default=[]):
            if each["name"] not in SYSCTLS:
                yield f"{workload}: sysctl {each['name']} is not allowed"


def root_file_system_is_read_only(manifests: Manifests) -> Iterator[str]:
    for _, container in _containers(manifests):
        if at(container.spec, "securityContext", "readOnlyRootFilesystem") is not True:
            yield f"{container} should have readOnlyRootFilesystem: true"


def no_account_tokens(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        account = manifests.find("ServiceAccount", workload.pod.get("serviceAccountName", ""))
        by_account = at(account, "automountServiceAccountToken")
        if workload.pod.get("automountServiceAccountToken", by_account) is not False:
            yield f"{workload}: should have automountServiceAccountToken: false"
        for volume in workload.volumes:
            if any("serviceAccountToken" in each for each in at(volume, "projected", "sources", default=[])):
                yield f"{workload}: volume {volume['name']!r} has an account's token"


def _containers(manifests: Manifests) -> Iterator[tuple[Workload, Container]]:
    for workload in manifests.workloads:
        for container in workload.containers:
            yield workload, container


def _contexts(manifests: Manifests) -> Iterator[tuple[str, Document]]:
    """The security contexts of pods and of containers, and whose they are."""
    for workload in manifests.workloads:
        yield str(workload), at(workload.pod, "securityContext", default={})
        for container in workload.containers:
            yield str(container), at(container.spec, "securityContext", default={})


def _effective(workload: Workload, container: Container, field: str) -> object:
    return at(container.spec, "securityContext", field, default=at(workload.pod, "securityContext", field))


RULES = (
    namespace_enforces_restricted,
    no_host_namespaces,
    no_host_process,
    not_privileged,
    no_host_ports,
    no_other_hosts_probed,
    volumes_are_allowed,
    capabilities_are_dropped,
    no_privilege_escalation,
    not_root,
    users_are_numbered,
    no_user_0,
    seccomp_confines,
    apparmor_confines,
    selinux_confines,
    proc_is_masked,
    sysctls_are_safe,
    root_file_system_is_read_only,
    no_account_tokens,
)
