"""How many pods run, how many survive a node drain, and what does each of them get?"""

from __future__ import annotations

from collections.abc import Iterator

from .model import Document, Manifests, Workload, at, dict_at, list_at, selects, title


def workloads_have_pods(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if at(workload.document, "spec", "replicas") == 0:
            yield f"{workload}: has replicas: 0, and serves nobody"


def resources_are_bounded(manifests: Manifests) -> Iterator[str]:
    """Autoscalers count CPU against the request, and an evaluator sizes its engines to the CPU limit."""
    for _, container in manifests.containers:
        for resource in ("cpu", "memory"):
            for bound in ("requests", "limits"):
                if resource not in dict_at(container.spec, "resources", bound):
                    yield f"{container} has no {resource} {bound.removesuffix('s')}"


def scalers_have_targets(manifests: Manifests) -> Iterator[str]:
    for scaler in manifests.all_scalers():
        target = dict_at(scaler, "spec", "scaleTargetRef")
        document = manifests.find(target.get("kind", ""), target.get("name", ""))
        if not document or document["apiVersion"] != target.get("apiVersion"):
            yield f"{title(scaler)}: there is no {target.get('apiVersion')} {target.get('kind')} {target.get('name')}"


def workloads_have_one_scaler(manifests: Manifests) -> Iterator[str]:
    """Each `kubectl apply` would set replicas of the workload's own again, and undo what the autoscaler did."""
    for workload in manifests.workloads:
        scalers = [title(each) for each in manifests.scalers(workload)]
        if scalers and at(workload.document, "spec", "replicas") is not None:
            scalers.append("replicas of its own")
        if len(scalers) > 1:
            yield f"{workload}: is scaled by {' and by '.join(scalers)}"


def budgets_select_one_workload(manifests: Manifests) -> Iterator[str]:
    for budget in manifests.of("PodDisruptionBudget"):
        selected = manifests.selected(dict_at(budget, "spec", "selector"))
        if len(selected) != 1:
            names = ", ".join(str(each) for each in selected) or "none"
            yield f"{title(budget)}: should select the pods of one workload, selects {names}"


def several_pods_have_one_budget(manifests: Manifests) -> Iterator[str]:
    """Without a budget a node drain may evict all pods at once. With two, the API server evicts none."""
    for workload in manifests.workloads:
        budgets = [title(budget) for budget, owner, *_ in _budgets(manifests) if owner is workload]
        if manifests.replicas(workload) > 1 and not budgets:
            yield f"{workload}: has {manifests.replicas(workload)} pods and no PodDisruptionBudget"
        if len(budgets) > 1:
            yield f"{workload}: has {' and '.join(budgets)}, and no pod with two budgets can be evicted"


def budgets_let_drains_go_on(manifests: Manifests) -> Iterator[str]:
    for budget, workload, pods, evicted in _budgets(manifests):
        if evicted < 1:
            yield f"{title(budget)}: lets a node drain evict none of {_count(pods)} of {workload}"


def budgets_leave_enough_pods(manifests: Manifests) -> Iterator[str]:
    """A majority of etcd's members, since fewer cannot write; one pod of every other workload."""
    for budget, workload, pods, evicted in _budgets(manifests):
        wanted = pods // 2 + 1 if workload.component == "etcd" else 1
        if pods > 1 and pods - evicted < wanted:
            left = f"leave {max(pods - evicted, 0)} of {_count(pods)} of {workload}, should leave {wanted}"
            yield f"{title(budget)}: lets a node drain {left}"


def several_pods_are_spread(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        constraints = list_at(workload.pod, "topologySpreadConstraints")
        pods = manifests.replicas(workload)
        if pods > 1 and not constraints:
            yield f"{workload}: has {pods} pods and no topology spread constraint"
        for constraint in constraints:
            where = f"{workload}: topology spread over {constraint.get('topologyKey')}"
            selector: Document = dict_at(constraint, "labelSelector")
            if not selector or not selects(selector, workload.labels):
                yield f"{where} does not select its own pods"
            elif any(other is not workload for other in manifests.selected(selector)):
                yield f"{where} counts the pods of other workloads too"


def etcd_members_start_together(manifests: Manifests) -> Iterator[str]:
    """A member is ready once a majority runs. One after the other, the first would wait for the second for ever."""
    for workload in _etcd(manifests):
        if manifests.replicas(workload) > 1 and at(workload.document, "spec", "podManagementPolicy") != "Parallel":
            yield f"{workload}: should have podManagementPolicy: Parallel"


def etcd_members_are_all_named(manifests: Manifests) -> Iterator[str]:
    for workload in _etcd(manifests):
        wanted = [f"{workload.name}-{number}" for number in range(manifests.replicas(workload))]
        for container in workload.containers:
            cluster = container.flag("initial-cluster", "ETCD") or ""
            named = [each.partition("=")[0] for each in cluster.split(",")]
            if sorted(named) != sorted(wanted):
                yield f"{container} has --initial-cluster of {', '.join(named)}, should be of {', '.join(wanted)}"


def _etcd(manifests: Manifests) -> list[Workload]:
    return [each for each in manifests.workloads if each.component == "etcd"]


def _budgets(manifests: Manifests) -> Iterator[tuple[Document, Workload, int, int]]:
    """Each budget, its workload, the least number of pods, and how many of these it lets a drain evict at once."""
    for budget in manifests.of("PodDisruptionBudget"):
        least, most = (at(budget, "spec", each) for each in ("minAvailable", "maxUnavailable"))
        for workload in manifests.selected(dict_at(budget, "spec", "selector")):
            pods = manifests.replicas(workload)
            yield budget, workload, pods, _number(most or 0, pods) if least is None else pods - _number(least, pods)


def _number(value: int | str, whole: int) -> int:
    """A number, or a percentage of ``whole``, rounded up as the API server does."""
    return -(-whole * int(value.removesuffix("%")) // 100) if isinstance(value, str) else value


def _count(pods: int) -> str:
    return "1 pod" if pods == 1 else f"{pods} pods"


RULES = (
    workloads_have_pods,
    resources_are_bounded,
    scalers_have_targets,
    workloads_have_one_scaler,
    budgets_select_one_workload,
    several_pods_have_one_budget,
    budgets_let_drains_go_on,
    budgets_leave_enough_pods,
    several_pods_are_spread,
    etcd_members_start_together,
    etcd_members_are_all_named,
)
