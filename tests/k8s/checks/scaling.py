"""Rules of how many pods there are: scaling, disruption, spread."""

from __future__ import annotations

from collections.abc import Iterator

from .model import Document, Manifests, Workload, at, number_of, quantity, title


def scalers_have_targets(manifests: Manifests) -> Iterator[str]:
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        target = at(scaler, "spec", "scaleTargetRef", default={})
        document = manifests.find(target.get("kind", ""), target.get("name", ""))
        if not document:
            yield f"{title(scaler)}: there is no {target.get('kind')} {target.get('name')}"
        elif document["apiVersion"] != target.get("apiVersion"):
            yield f"{title(scaler)}: its target is of {document['apiVersion']}, not of {target.get('apiVersion')}"


def one_scaler_each(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        scalers = [title(each) for each in manifests.scalers(workload)]
        if len(scalers) > 1:
            yield f"{workload}: is scaled by {' and by '.join(scalers)}"


def scalers_have_room(manifests: Manifests) -> Iterator[str]:
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        least, most = at(scaler, "spec", "minReplicas", default=1), at(scaler, "spec", "maxReplicas")
        if least > most:
            yield f"{title(scaler)}: its minimum of {least} pods is more than its maximum of {most}"
        if least < 1:
            yield f"{title(scaler)}: its minimum of {least} pods serves nobody"


def scaled_have_no_replicas(manifests: Manifests) -> Iterator[str]:
    """A number of their own would be applied each time, and undo what the autoscaler did."""
    for workload in manifests.workloads:
        if manifests.scalers(workload) and at(workload.document, "spec", "replicas") is not None:
            yield f"{workload}: has replicas of its own beside a HorizontalPodAutoscaler"


def scaled_resources_are_requested(manifests: Manifests) -> Iterator[str]:
    """A utilization is a part of what is requested."""
    for workload in manifests.workloads:
        for scaler in manifests.scalers(workload):
            for resource, container in _metrics(scaler):
                specs = [each for each in workload.lasting if container in (None, each.spec["name"])]
                if not specs:
                    yield f"{title(scaler)}: {workload} has no container {container!r}"
                for each in specs:
                    if not quantity(at(each.spec, "resources", "requests", resource, default=0)):
                        yield f"{title(scaler)}: counts {resource}, and {each} requests none"


def metrics_have_targets(manifests: Manifests) -> Iterator[str]:
    """A metric's type names the field that says which it is, and its target's type the one that says how much."""
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        for metric in at(scaler, "spec", "metrics", default=[]):
            kind: str = metric["type"]
            target = at(metric, _lower(kind), "target", default={})
            field = "averageUtilization" if target.get("type") == "Utilization" else _lower(target.get("type", "-"))
            if field not in target:
                yield f"{title(scaler)}: its metric of type {kind} has no target"


def budgets_select_one_workload(manifests: Manifests) -> Iterator[str]:
    for budget in manifests.of("PodDisruptionBudget"):
        selected = manifests.selected(at(budget, "spec", "selector", default={}))
        if len(selected) != 1:
            names = ", ".join(str(each) for each in selected) or "none"
            yield f"{title(budget)}: should select the pods of one workload, selects {names}"


def budgets_say_one_thing(manifests: Manifests) -> Iterator[str]:
    for budget in manifests.of("PodDisruptionBudget"):
        if (at(budget, "spec", "minAvailable") is None) == (at(budget, "spec", "maxUnavailable") is None):
            yield f"{title(budget)}: should have one of minAvailable and maxUnavailable"


def several_pods_have_one_budget(manifests: Manifests) -> Iterator[str]:
    """Without one a drain may take all pods at once; with two, the server evicts none."""
    for workload in manifests.workloads:
        budgets = [title(each) for each in manifests.of("PodDisruptionBudget") if _is_of(each, manifests, workload)]
        if manifests.replicas(workload) > 1 and not budgets:
            yield f"{workload}: has {manifests.replicas(workload)} pods and no PodDisruptionBudget"
        if len(budgets) > 1:
            yield f"{workload}: has {' and '.join(budgets)}, and no pod with two budgets can be evicted"


def drains_can_go_on(manifests: Manifests) -> Iterator[str]:
    for budget, workload, pods, evicted in _budgets(manifests):
        if evicted < 1:
            yield f"{title(budget)}: of {_count(pods)} of {workload}, none could ever be evicted"


def drains_leave_enough(manifests: Manifests) -> Iterator[str]:
    for budget, workload, pods, evicted in _budgets(manifests):
        # Only a majority of etcd's members can write.
        wanted = pods // 2 + 1 if workload.component == "etcd" else 1
        if pods > 1 and pods - evicted < wanted:
            yield f"{title(budget)}: of {_count(pods)} of {workload}, a drain may leave {max(pods - evicted, 0)}"


def several_pods_are_spread(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        pods = manifests.replicas(workload)
        if pods > 1 and not at(workload.pod, "topologySpreadConstraints"):
            yield f"{workload}: has {pods} pods and no topology spread constraint"


def members_start_together(manifests: Manifests) -> Iterator[str]:
    """A member of etcd is ready when a majority is there: in order, the second would wait for the first for ever."""
    for workload in manifests.workloads:
        together = at(workload.document, "spec", "podManagementPolicy") == "Parallel"
        if workload.component == "etcd" and manifests.replicas(workload) > 1 and not together:
            yield f"{workload}: should have podManagementPolicy: Parallel"


def _lower(kind: str) -> str:
    """A type as the field is called that goes with it."""
    return kind[0].lower() + kind[1:]


def _metrics(scaler: Document) -> Iterator[tuple[str, str | None]]:
    """The resources that an autoscaler counts, each of one container, or of all."""
    for metric in at(scaler, "spec", "metrics", default=[]):
        for field in ("resource", "containerResource"):
            if field in metric:
                yield metric[field]["name"], metric[field].get("container")


def _is_of(budget: Document, manifests: Manifests, workload: Workload) -> bool:
    return workload in manifests.selected(at(budget, "spec", "selector", default={}))


def _budgets(manifests: Manifests) -> Iterator[tuple[Document, Workload, int, int]]:
    """Each budget, its workload, how many pods that has at least, and how many of these may be evicted at once."""
    for budget in manifests.of("PodDisruptionBudget"):
        least, most = (at(budget, "spec", each) for each in ("minAvailable", "maxUnavailable"))
        for workload in manifests.selected(at(budget, "spec", "selector", default={})):
            pods = manifests.replicas(workload)
            if least is not None:
                yield budget, workload, pods, pods - number_of(least, pods)
            elif most is not None:
                yield budget, workload, pods, number_of(most, pods)


def _count(pods: int) -> str:
    return "1 pod" if pods == 1 else f"{pods} pods"


RULES = (
    scalers_have_targets,
    one_scaler_each,
    scalers_have_room,
    scaled_have_no_replicas,
    scaled_resources_are_requested,
    metrics_have_targets,
    budgets_select_one_workload,
    budgets_say_one_thing,
    several_pods_have_one_budget,
    drains_can_go_on,
    drains_leave_enough,
    several_pods_are_spread,
    members_start_together,
)
