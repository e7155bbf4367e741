"""One evaluator beside what it is made of: onnxruntime alone, a bare loop around it, and the service over real gRPC.

    python -m bench.evaluator [--seconds 2] [--rounds 3] [--json FILE]

The digits net with a small PNG, and MobileNet v1 with drawn weights with a JPEG of 640x480. The bare loop decodes,
resizes and runs, in as many threads, with as many threads of onnxruntime each, and in batches as large as is best;
nothing is received, queued or answered. The evaluator is a real one, with a registry and etcd, and is asked as a gate
asks it: over one stream, by a load generator on the same cores. Both are measured by turns; compare the ratios of one
run, never figures of different machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import uvloop
from google.protobuf.message import Message
from numpy.typing import NDArray

from atserving import transport
from atserving.v1 import evaluator_pb2, serving_pb2
from evaluator.caffe import convert
from evaluator.runtime import cpus
from tests.caffe.nets import MODELS, write_net
from tests.evaluator.digits import DIGITS
from tests.processes import Registry, running_registry

CALLERS = (1, 8, 32, 64)
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_BATCHES = (1, 2, 4, 8, 16, 32)
_TIMEOUT_US = 60_000_000


@dataclass(frozen=True)
class Net:
    """What is measured: a release, and the picture that it is asked about."""

    name: str
    tar: Path
    picture: bytes
    mean: tuple[float, float, float]


@dataclass(frozen=True)
class Setting:
    """Loops at a time, onnxruntime's threads in each, and how many pictures a batch has."""

    loops: int
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.loops} x {self.threads}, batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """One measurement. CPU is milliseconds a picture, by process; p50 and p99 are of a batch in the loops."""

    net: str
    what: str
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: dict[str, float]
    errors: int = 0


class Loops:
    """The net without a service, in this process."""

    def __init__(self, net: Net) -> None:
        self._net = net
        with tempfile.TemporaryDirectory() as folder, tarfile.open(net.tar) as archive:
            archive.extractall(folder, filter="data")
            model = convert(Path(folder) / "deploy.prototxt", Path(folder) / "weight.caffemodel")
        self._model = model.SerializeToString()
        _, _, self._height, self._width = (dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}

    def _session(self, threads: int) -> onnxruntime.InferenceSession:
        if threads not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._sessions[threads] = onnxruntime.InferenceSession(
                self._model, options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[threads]

    def _planes(self) -> NDArray[np.float32]:
        pixels = cv2.imdecode(np.frombuffer(self._net.picture, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        resized = cv2.resize(pixels, (self._width, self._height), interpolation=cv2.INTER_LINEAR)
        return np.subtract(resized, np.array(self._net.mean, np.float32), dtype=np.float32).transpose(2, 0, 1)

    def measure(self, setting: Setting, seconds: float, *, decodes: bool) -> Row:
        session = self._session(setting.threads)
        name = session.get_inputs()[0].name
        ready = np.stack([self._planes() for _ in range(setting.batch)])

        def batch() -> None:
            planes = np.stack([self._planes() for _ in range(setting.batch)]) if decodes else ready
            session.run(None, {name: planes})

        batch()
        took_s, cpu_s, wall_s = _repeat(batch, setting.loops, seconds)
        count = len(took_s) * setting.batch
        what = f"{'decode, resize, ' if decodes else ''}onnxruntime, {setting}"
        return Row(
            self._net.name, what, count / wall_s, *_quantiles_ms(took_s), {"loop": round(cpu_s / count * 1e3, 3)}
        )

    def best(self, seconds: float, *, decodes: bool) -> tuple[Setting, list[Row]]:
        """The setting with the most pictures a second, and all that were tried."""
        available = cpus.available()
        shapes = {(1, 1), (available, 1), (1, available)}
        settings = [Setting(*shape, batch) for shape in sorted(shapes) for batch in _BATCHES]
        rows = [self.measure(setting, seconds, decodes=decodes) for setting in settings]
        return max(zip(settings, rows, strict=True), key=lambda pair: pair[1].per_s)[0], rows


def _repeat(work: Callable[[], None], loops: int, seconds: float) -> tuple[list[float], float, float]:
    """How long each took, and the CPU's and the clock's time of all, for about so many seconds."""
    took_s: list[float] = []
    until_s = time.perf_counter() + seconds

    def loop() -> None:
        while (began_s := time.perf_counter()) < until_s:
            work()
            took_s.append(time.perf_counter() - began_s)

    threads = [threading.Thread(target=loop) for _ in range(loops)]
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took_s, time.process_time() - cpu_s, time.perf_counter() - wall_s


def _quantiles_ms(took_s: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(took_s)
    return round(statistics.median(ordered) * 1e3, 3), round(ordered[int(len(ordered) * 0.99)] * 1e3, 3)


class Evaluator:
    """A running evaluator, and the load on it."""

    def __init__(self, net: Net, address: str, pid: int, plan: dict[str, Any]) -> None:
        self.plan = plan
        self._net = net
        self._address = address
        self._pid = pid

    def measure(self, callers: int, seconds: float) -> Row:
        before, own_s = self._cpu_s(), time.process_time()
        took_s, errors, wall_s = asyncio.run(self._load(callers, seconds))
        cpu_s = {name: used - before[name] for name, used in self._cpu_s().items()}
        cpu_s["load generator"] = time.process_time() - own_s
        cpu_ms = {name: round(used / len(took_s) * 1e3, 3) for name, used in cpu_s.items()}
        what = f"evaluator, {callers} callers"
        return Row(self._net.name, what, len(took_s) / wall_s, *_quantiles_ms(took_s), cpu_ms, errors)

    async def _load(self, callers: int, seconds: float) -> tuple[list[float], int, float]:
        """Each caller asks again as soon as it is answered: how long answers took, how many were errors."""
        sent_s: dict[int, float] = {}
        took_s: list[float] = []
        errors = next_id = 0
        same = evaluator_pb2.Call(
            request=evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=self._net.picture)], reqid="bench"),
            timeout_us=_TIMEOUT_US,
        ).SerializeToString()

        def frame(count: int) -> bytes:
            """Calls that differ in their id alone, put together from bytes: the generator's share is to be small."""
            nonlocal next_id
            parts = []
            for _ in range(count):
                next_id += 1
                sent_s[next_id] = time.perf_counter()
                own = evaluator_pb2.Call(id=next_id).SerializeToString()
                parts += [_field(1, len(own) + len(same)), own, same]
            return b"".join(parts)

        async with transport.channel(self._address) as channel:
            stream = channel.stream_stream(
                "/atserving.v1.EvaluatorService/Exchange",
                request_serializer=None,
                response_deserializer=evaluator_pb2.ExchangeResponse.FromString,
            )()  # type: ignore[call-arg] # requests are written one by one
            await stream.wait_for_connection()
            await stream.write(frame(callers))
            began_s = 0.0
            while not began_s or time.perf_counter() - began_s < seconds:
                response = await stream.read()
                assert isinstance(response, Message)
                replies = list(response.replies)  # type: ignore[attr-defined] # its type is the deserializer's
                now_s = time.perf_counter()
                # From the first answers on: by then every engine has work, and more waits.
                began_s = began_s or now_s
                for reply in replies:
                    took_s.append(now_s - sent_s.pop(reply.id))
                    errors += reply.response.HasField("error")
                await stream.write(frame(len(replies)))
            wall_s = time.perf_counter() - began_s
            stream.cancel()
        return took_s, errors, wall_s

    def _cpu_s(self) -> dict[str, float]:
        children = " ".join(path.read_text() for path in Path(f"/proc/{self._pid}/task").glob("*/children"))
        (worker,) = children.split()
        return {"front": _cpu_s(self._pid), "worker": _cpu_s(int(worker))}


def _field(number: int, length: int) -> bytes:
    """The tag and length of a protobuf message's field."""
    out = [number << 3 | 2]
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


@contextmanager
def _evaluator(registry: Registry, net: Net, folder: Path) -> Iterator[Evaluator]:
    values = {"net": "classify"} | ({} if net.name == "digits" else {"mean_values": list(net.mean)})
    registry.publish(net.name, file=f"file://{net.tar}", custom_values=values)
    # To a file, as in service: to read its lines is no part of the load.
    log = folder / f"{net.name}.log"
    command = [sys.executable, "-m", "evaluator", "--app", net.name, "--version", "v1", "--registry", registry.address]
    with log.open("wb") as stderr, subprocess.Popen([*command, "--listen", "127.0.0.1:0"], stderr=stderr) as process:
        try:
            address = _logged(log, process, "registered")["address"]
            yield Evaluator(net, str(address), process.pid, _logged(log, process, "warm"))
        finally:
            process.terminate()


def _logged(log: Path, process: subprocess.Popen[bytes], event: str) -> dict[str, Any]:
    """The first line of an event, waited for."""
    while process.poll() is None:
        for line in log.read_text().splitlines():
            fields: dict[str, Any] = json.loads(line) if line.endswith("}") else {}
            if fields.get("event") == event:
                return fields
        time.sleep(0.05)
    raise SystemExit(f"the evaluator ended: {log.read_text()}")


def _nets(folder: Path) -> Iterator[Net]:
    yield Net("digits", DIGITS / "digits-v1.tar", (DIGITS / "images" / "7.png").read_bytes(), (0, 0, 0))
    paths = write_net(folder / "mobilenet", (MODELS / "structures" / "mobilenet_v1.prototxt").read_text())
    with tarfile.open(folder / "mobilenet.tar", "w") as archive:
        for path in paths:
            archive.add(path, path.name)
    photo = cv2.resize(cv2.imread(str(MODELS / "images" / "cat.jpg")), (640, 480))  # type: ignore[arg-type]
    jpeg = cv2.imencode(".jpg", photo)[1].tobytes()
    yield Net("mobilenet", folder / "mobilenet.tar", jpeg, (103.94, 116.78, 123.68))


def compare(
    registry: Registry, net: Net, folder: Path, seconds: float, rounds: int
) -> tuple[list[Row], dict[str, float]]:
    """Every row of one net, and the figures that come of them."""
    loops = Loops(net)
    alone, rows = loops.best(seconds / 4, decodes=False)
    bare, tried = loops.best(seconds / 4, decodes=True)
    rows += tried
    rounds_of: dict[str, list[Row]] = {}
    with _evaluator(registry, net, folder) as evaluator:
        one = Setting(1, evaluator.plan["threads"], 1)
        for callers in CALLERS:
            evaluator.measure(callers, seconds / 4)
        for _ in range(rounds):
            found = {
                "alone": loops.measure(alone, seconds, decodes=False),
                "bare": loops.measure(bare, seconds, decodes=True),
                "bare one": loops.measure(one, seconds, decodes=True),
            }
            found |= {f"c{callers}": evaluator.measure(callers, seconds) for callers in CALLERS}
            for name, row in found.items():
                rounds_of.setdefault(name, []).append(row)
    rows += [_median(each) for each in rounds_of.values()]
    pairs = list(zip(rounds_of["bare"], rounds_of["bare one"], *(rounds_of[f"c{n}"] for n in CALLERS), strict=True))
    figures: dict[str, float] = {"bare_loop.per_s": statistics.median(row.per_s for row in rounds_of["bare"])}
    figures["onnxruntime.per_s"] = statistics.median(row.per_s for row in rounds_of["alone"])
    for place, callers in enumerate(CALLERS, start=2):
        mine = rounds_of[f"c{callers}"]
        figures[f"c{callers}.per_s"] = statistics.median(row.per_s for row in mine)
        figures[f"c{callers}.p50_ms"] = statistics.median(row.p50_ms for row in mine)
        figures[f"c{callers}.p99_ms"] = statistics.median(row.p99_ms for row in mine)
        figures[f"c{callers}.cpu_s"] = statistics.median(sum(row.cpu_ms.values()) for row in mine) / 1e3
        figures[f"c{callers}.errors"] = sum(row.errors for row in mine)
        figures[f"c{callers}.ratio_to_bare_loop"] = statistics.median(
            pair[place].per_s / pair[0].per_s for pair in pairs
        )
    figures["c1.added_p50_ms"] = statistics.median(pair[2].p50_ms - pair[1].p50_ms for pair in pairs)
    return rows, {f"{net.name}.{name}": round(value, 6) for name, value in figures.items()}


def _median(rows: Sequence[Row]) -> Row:
    """The row in the middle of several of the same, by its rate."""
    ordered = sorted(rows, key=lambda row: row.per_s)
    return ordered[len(ordered) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each row takes (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if not MODELS.exists():
        raise SystemExit("the benchmark needs the structures of ../shared/models")
    # The loops are the parallelism, as an evaluator's engines are.
    cv2.setNumThreads(1)
    uvloop.install()
    rows: list[Row] = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, running_registry(Path(folder) / "etcd") as registry:
        for net in _nets(Path(folder)):
            print(f"{net.name}:", flush=True)
            of_net, of_figures = compare(registry, net, Path(folder), arguments.seconds, arguments.rounds)
            for row in of_net:
                cpu = ", ".join(f"{name} {value:g}" for name, value in row.cpu_ms.items())
                print(
                    f"  {row.what:48}{row.per_s:9.0f}/s  p50 {row.p50_ms:8.2f}  p99 {row.p99_ms:8.2f} ms  CPU ms {cpu}"
                )
            rows, figures = rows + of_net, figures | of_figures
    for name, value in figures.items():
        print(f"{name:40}{value:12.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
