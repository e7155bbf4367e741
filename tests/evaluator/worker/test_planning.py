"""Planning takes a net's plan from the release or from measurements, and runs the net once with each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import StartError
from evaluator.net_config import NetConfig
from evaluator.net_contract import LoadedNet, Req, Ret
from evaluator.options import Options
from evaluator.runtime import cpus, memory
from evaluator.worker import planning as module
from evaluator.worker.plan import Plan
from evaluator.worker.planning import for_built_in


class Net:
    """A net that records its batch sizes and its threads, and returns ``ret`` for batches of size ``fails_at``."""

    def __init__(self, fails_at: int = 0, ret: Ret | None = None) -> None:
        self.sizes: list[int] = []
        self.batch_size: int | None = None
        self.threads: list[Any] = []
        self._fails_at = fails_at
        self._ret = ret or {"code": 0, "result": {}}

    def load(self, config: NetConfig) -> LoadedNet:
        self.threads.append(config.model_params.fields.get("intra_op_threads"))
        self.batch_size = config.batch_size or 32
        return self

    def preprocess(self, req: Req) -> Req:
        assert req["data"]["body"]
        return req

    def infer(self, reqid: str, reqs: Sequence[Any]) -> list[Ret]:
        self.sizes.append(len(reqs))
        ok: Ret = {"code": 0, "result": {}}
        return [self._ret if len(reqs) == self._fails_at else ok] * len(reqs)


def release(
    workspace: Path,
    *,
    batch_size: int | None = None,
    use_device: str = "CPU",
    tar_files: dict[str, Path] | None = None,
    **params: Any,
) -> NetConfig:
    return NetConfig(
        tar_files or {},
        model_params=Options("model_params", params),
        workspace=workspace,
        batch_size=batch_size,
        use_device=use_device,
    )


@pytest.mark.parametrize(
    ("params", "engines", "threads"),
    [
        ({"engines": 3}, 3, 1),
        ({"intra_op_threads": 2}, 2, 2),
        ({"intra_op_threads": 4}, 1, 4),
        ({"engines": 2, "intra_op_threads": 5}, 2, 5),
    ],
)
def test_plan_of_the_release_is_not_measured(
    params: dict[str, Any], engines: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 4)
    net = Net()
    _, plan = for_built_in(net.load, release(tmp_path, batch_size=5, **params))
    assert (plan.engines, plan.threads, plan.batch_size, plan.measured) == (engines, threads, 5, {})
    assert net.threads == [threads]
    # The warm-up ran each batch size once.
    assert net.sizes == [1, 2, 4, 5]


SCALES = {(1, 1, 1): 5.0, (2, 1, 1): 5.1, (4, 1, 1): 5.2}
"""Milliseconds per request, by engines, threads and batch size, of a net whose engines do not contend."""


def plan_of_costs(
    costs_ms: dict[tuple[int, int, int], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone_ms: float = 5.0,
    **fields: Any,
) -> Plan:
    """Return the plan on four CPUs of a net with these measured costs.

    A lone request takes 5 ms with one thread, and ``alone_ms`` with one for each CPU.
    """

    def cost_s(self: Any, engines: int, size: int, measured: dict[str, float]) -> float:
        measured[f"{engines}x{self.threads} batch {size}"] = costs_ms[engines, self.threads, size] / 1000
        return costs_ms[engines, self.threads, size] / 1000

    monkeypatch.setattr(cpus, "available", lambda: 4)
    monkeypatch.setattr(module._Net, "cost_s", cost_s)
    monkeypatch.setattr(module._Net, "alone_s", lambda self, _: (5.0 if self.threads == 1 else alone_ms) / 1000)
    return for_built_in(Net().load, release(tmp_path, **fields))[1]


def test_engines_of_one_thread_use_every_cpu_with_the_cheapest_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {(2, 2, 1): 5.0, (1, 4, 1): 6.0, (4, 1, 2): 5.1, (4, 1, 4): 5.05, (4, 1, 8): 5.2, (4, 1, 16): 6.0}
    plan = plan_of_costs(SCALES | others, tmp_path, monkeypatch)
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers) == (4, 1, 4, 0)
    assert plan.lanes
    assert plan.measured["4x1 batch 4"] == 5.05
    # A batch of 16 takes longer than the limit of 50 ms.
    assert "4x1 batch 16" in plan.measured


def test_fewer_engines_of_more_threads_win_only_if_much_cheaper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {(2, 2, 1): 4.0, (1, 4, 1): 3.9}
    plan = plan_of_costs(SCALES | others, tmp_path, monkeypatch, batch_size=6)
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers) == (2, 2, 6, 4)
    assert not plan.lanes


@pytest.mark.parametrize(("alone_ms", "available", "wide"), [(2.0, 300, True), (4.9, 300, False), (2.0, 299, False)])
def test_a_lone_request_gets_every_cpu_if_that_is_faster_and_there_is_memory(
    alone_ms: float, available: int, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {(2, 2, 1): 5.0, (1, 4, 1): 6.0} | {(4, 1, size): 5.0 for size in (2, 4, 8, 16)}
    weights = tmp_path / "weight.caffemodel"
    weights.write_bytes(bytes(100))
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    plan = plan_of_costs(SCALES | others, tmp_path, monkeypatch, alone_ms, tar_files={weights.name: weights})
    assert (plan.engines, plan.threads, plan.wide) == (4, 1, wide)


def test_engines_that_contend_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs_ms = {(1, 1, 1): 1.0, (2, 1, 1): 1.1, (4, 1, 1): 2.0} | {(2, 1, 2**n): 1.0 for n in range(1, 5)}
    plan = plan_of_costs(costs_ms, tmp_path, monkeypatch)
    # The other CPUs prepare requests if pictures take long to decode.
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers, plan.lanes) == (2, 1, 16, 2, True)
    assert not plan.reads


def test_net_that_is_mostly_python_gets_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of_costs({(1, 1, 2**n): 0.1 for n in range(5)}, tmp_path, monkeypatch)
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers, plan.lanes) == (1, 1, 16, 3, True)
    assert plan.reads


def test_known_plan_is_not_measured_again(tmp_path: Path) -> None:
    known = Plan(2, 1, 4, lanes=True, measured={"2x1 batch 1": 1.0})
    net = Net()
    assert for_built_in(net.load, release(tmp_path), known)[1] is known
    assert net.sizes == [1, 2, 4]


def test_known_plan_loads_the_session_of_lone_requests_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 4)
    net = Net()
    runner, _ = for_built_in(net.load, release(tmp_path), Plan(4, 1, 1, lanes=True, wide=True))
    assert runner.wide is not None
    assert net.threads == [1, 4]


def test_measured_plan_uses_the_available_cpus(tmp_path: Path) -> None:
    _, plan = for_built_in(Net().load, release(tmp_path))
    assert 1 <= plan.engines * plan.threads <= cpus.available()
    assert plan.measured
    assert all(cost_ms > 0 for cost_ms in plan.measured.values())
    assert plan.lanes == (plan.threads == 1)


def test_gpu_gets_one_engine_and_preparers(tmp_path: Path) -> None:
    _, plan = for_built_in(Net().load, release(tmp_path, use_device="GPU"))
    assert (plan.engines, plan.batch_size, plan.preparers) == (1, 32, cpus.available())


@pytest.mark.parametrize("ret", [{"code": -2, "message": "out of memory"}, {"code": 500, "message": "out of memory"}])
def test_net_that_fails_to_warm_up_fails_to_start(ret: Ret, tmp_path: Path) -> None:
    net = Net(fails_at=2, ret=ret)
    with pytest.raises(StartError, match="failed to warm up: out of memory"):
        for_built_in(net.load, release(tmp_path, batch_size=2, engines=1))
    assert net.sizes == [1, 2]


@pytest.mark.parametrize(("key", "value"), [("engines", 0), ("engines", 1000), ("intra_op_threads", "2")])
def test_error_names_the_wrong_model_param(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"model_params.{key} is "):
        for_built_in(Net().load, release(tmp_path, **{key: value}))
