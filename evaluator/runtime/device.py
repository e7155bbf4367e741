"""Where a release's net runs, and how: its ``use_device``, and what its ``model_params`` say to onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atserving.errors import StartError
from evaluator.options import Options

_BATCH_SIZE_GPU = 32
_BATCH_SIZE_CPU = 8
_CONV_SEARCHES = ("DEFAULT", "HEURISTIC", "EXHAUSTIVE")


@dataclass(frozen=True)
class Device:
    """A device and its options; see docs/evaluator.md for what each does.

    ``name`` is ``CPU``, ``GPU`` or ``GPU:<index>``. ``batch_size`` is the largest batch, which TensorRT builds for.
    ``cache`` is a folder for what TensorRT builds; None: it keeps nothing.
    """

    name: str = "CPU"
    intra_op_threads: int | None = None
    spinning: bool = False
    arena: bool = True
    tensorrt: bool = False
    fp16: bool = False
    tf32: bool = True
    gpu_mem_limit_mib: int | None = None
    cudnn_conv_algo_search: str = "HEURISTIC"
    batch_size: int = _BATCH_SIZE_CPU
    cache: Path | None = None

    @staticmethod
    def of_release(cfg: Mapping[str, Any]) -> Device:
        """What the ``cfg`` of ``net_init`` says. Raises StartError, which names the field."""
        name = cfg["use_device"]
        values = Options("model_params", cfg["model_params"])
        # Each search but the exhaustive is cheap for a size it has not seen: batches come in any.
        search = values.text("cudnn_conv_algo_search", Device.cudnn_conv_algo_search)
        if search not in _CONV_SEARCHES:
            raise StartError(f"model_params.cudnn_conv_algo_search is {search!r}, should be {_or(_CONV_SEARCHES)}")
        workspace = cfg["custom_values"].get("workspace")
        device = Device(
            name,
            intra_op_threads=values.optional_positive_int("intra_op_threads"),
            spinning=values.boolean("spinning", Device.spinning),
            arena=values.boolean("arena", Device.arena),
            tensorrt=values.boolean("tensorrt", Device.tensorrt),
            fp16=values.boolean("fp16", Device.fp16),
            tf32=values.boolean("tf32", Device.tf32),
            gpu_mem_limit_mib=values.optional_positive_int("gpu_mem_limit_mib"),
            cudnn_conv_algo_search=search,
            batch_size=cfg["batch_size"] or (_BATCH_SIZE_CPU if name == "CPU" else _BATCH_SIZE_GPU),
            cache=Path(workspace) / "tensorrt" if workspace else None,
        )
        for key, wanted in (("tensorrt", device.tensorrt), ("fp16", device.fp16)):
            if wanted and device.is_cpu:
                raise StartError(f"model_params.{key} is true, but use_device is CPU")
        return device

    @property
    def is_cpu(self) -> bool:
        return self.name == "CPU"

    @property
    def index(self) -> int:
        """Of the GPU, among those that CUDA sees."""
        return int(self.name.partition(":")[2] or 0)

    @property
    def halves_graph(self) -> bool:
        """Whether the graph itself has to compute in float16: TensorRT does it by an option of its own."""
        return self.fp16 and not self.tensorrt


CPU = Device()


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
