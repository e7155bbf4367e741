"""How a net is to run: what the release says, or what was measured; and that it runs before it is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import StartError
from evaluator.net_config import NetConfig
from evaluator.net_contract import LoadedNet, Req, Ret
from evaluator.options import Options
from evaluator.runtime import cpus
from evaluator.worker import planning as module
from evaluator.worker.plan import Plan
from evaluator.worker.planning import for_built_in


class Net:
    """A net that remembers the sizes of its batches and the threads it was loaded for, and fails as it is told."""

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


def release(workspace: Path, *, batch_size: int | None = None, use_device: str = "CPU", **params: Any) -> NetConfig:
    return NetConfig(
        {},
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
def test_what_a_release_says_is_not_measured(
    params: dict[str, Any], engines: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 4)
    net = Net()
    _, plan = for_built_in(net.load, release(tmp_path, batch_size=5, **params))
    assert (plan.engines, plan.threads, plan.batch_size, plan.measured) == (engines, threads, 5, {})
    assert net.threads == [threads]
    # Every bucket of batches, once: it is warm.
    assert net.sizes == [1, 2, 4, 5]


SCALES = {(1, 1, 1): 5.0, (2, 1, 1): 5.1, (4, 1, 1): 5.2}
"""Milliseconds by engines, threads and batch size of a net whose engines don't get in each other's way."""


def planned(
    costs_ms: dict[tuple[int, int, int], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> Plan:
    """The plan on four CPUs of a net that costs so much."""

    def cost_s(self: Any, engines: int, size: int, measured: dict[str, float]) -> float:
        measured[f"{engines}x{self.threads} batch {size}"] = costs_ms[engines, self.threads, size] / 1000
        return costs_ms[engines, self.threads, size] / 1000

    monkeypatch.setattr(cpus, "available", lambda: 4)
    monkeypatch.setattr(module._Net, "cost_s", cost_s)
    return for_built_in(Net().load, release(tmp_path, **fields))[1]


def test_engines_of_one_thread_use_every_cpu_and_batches_are_what_is_cheapest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {(2, 2, 1): 5.0, (1, 4, 1): 6.0, (4, 1, 2): 5.1, (4, 1, 4): 5.05, (4, 1, 8): 5.2, (4, 1, 16): 6.0}
    plan = planned(SCALES | others, tmp_path, monkeypatch)
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers) == (4, 1, 4, 0)
    assert plan.lanes
    assert plan.measured["4x1 batch 4"] == 5.05
    # A batch of 16 takes longer than callers should wait for each other.
    assert "4x1 batch 16" in plan.measured


def test_fewer_engines_of_more_threads_have_to_be_much_cheaper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {(2, 2, 1): 4.0, (1, 4, 1): 3.9}
    plan = planned(SCALES | others, tmp_path, monkeypatch, batch_size=6)
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers) == (2, 2, 6, 4)
    assert not plan.lanes


def test_where_engines_are_in_each_others_way_there_are_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_ms = {(1, 1, 1): 1.0, (2, 1, 1): 1.1, (4, 1, 1): 2.0} | {(2, 1, 2**n): 1.0 for n in range(1, 5)}
    plan = planned(costs_ms, tmp_path, monkeypatch)
    # The other CPUs help where pictures take long to decode.
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers, plan.lanes) == (2, 1, 16, 2, True)


def test_what_is_mostly_python_has_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned({(1, 1, 2**n): 0.1 for n in range(5)}, tmp_path, monkeypatch)
    assert (plan.engines, plan.threads, plan.batch_size, plan.preparers, plan.lanes) == (1, 1, 16, 3, True)


def test_what_was_measured_once_is_not_measured_again(tmp_path: Path) -> None:
    known = Plan(2, 1, 4, lanes=True, measured={"2x1 batch 1": 1.0})
    net = Net()
    assert for_built_in(net.load, release(tmp_path), known)[1] is known
    assert net.sizes == [1, 2, 4]


def test_a_real_measurement_ends_in_a_plan_that_uses_every_cpu(tmp_path: Path) -> None:
    _, plan = for_built_in(Net().load, release(tmp_path))
    assert 1 <= plan.engines * plan.threads <= cpus.available()
    assert plan.measured
    assert all(cost_ms > 0 for cost_ms in plan.measured.values())
    assert plan.lanes == (plan.threads == 1)


def test_a_gpu_has_one_engine_and_threads_that_prepare(tmp_path: Path) -> None:
    _, plan = for_built_in(Net().load, release(tmp_path, use_device="GPU"))
    assert (plan.engines, plan.batch_size, plan.preparers) == (1, 32, cpus.available())


@pytest.mark.parametrize("ret", [{"code": -2, "message": "out of memory"}, {"code": 500, "message": "out of memory"}])
def test_a_net_that_can_not_answer_a_batch_does_not_start(ret: Ret, tmp_path: Path) -> None:
    net = Net(fails_at=2, ret=ret)
    with pytest.raises(StartError, match="failed to warm up: out of memory"):
        for_built_in(net.load, release(tmp_path, batch_size=2, engines=1))
    assert net.sizes == [1, 2]


@pytest.mark.parametrize(("key", "value"), [("engines", 0), ("engines", 1000), ("intra_op_threads", "2")])
def test_wrong_params_are_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"model_params.{key} is "):
        for_built_in(Net().load, release(tmp_path, **{key: value}))
