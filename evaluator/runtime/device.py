"""The device of a release's net and its options: ``use_device``, and the ``model_params`` for onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atserving.errors import StartError
from evaluator.net_config import NetConfig

_BATCH_SIZE_GPU = 32
_BATCH_SIZE_CPU = 8
_CONV_SEARCHES = ("DEFAULT", "HEURISTIC", "EXHAUSTIVE")


@dataclass(frozen=True)
class Device:
    """A device and its options; docs/config.md explains each.

    ``name`` is ``CPU``, ``GPU`` or ``GPU:<index>``. TensorRT builds engines for batches of up to ``batch_size``, and
    keeps them in the folder ``cache``, if there is one.
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
    def of_release(config: NetConfig) -> Device:
        """Read ``use_device`` and ``model_params``. Raises StartError, which names the field."""
        name, options = config.use_device, config.model_params
        # Batches come in any size, and only the exhaustive search is slow for a new size.
        search = options.text("cudnn_conv_algo_search", Device.cudnn_conv_algo_search)
        if search not in _CONV_SEARCHES:
            raise StartError(f"model_params.cudnn_conv_algo_search is {search!r}, should be {_or(_CONV_SEARCHES)}")
        device = Device(
            name,
            intra_op_threads=options.optional_positive_int("intra_op_threads"),
            spinning=options.boolean("spinning", Device.spinning),
            arena=options.boolean("arena", Device.arena),
            tensorrt=options.boolean("tensorrt", Device.tensorrt),
            fp16=options.boolean("fp16", Device.fp16),
            tf32=options.boolean("tf32", Device.tf32),
            gpu_mem_limit_mib=options.optional_positive_int("gpu_mem_limit_mib"),
            cudnn_conv_algo_search=search,
            batch_size=config.batch_size or (_BATCH_SIZE_CPU if name == "CPU" else _BATCH_SIZE_GPU),
            cache=config.workspace / "tensorrt" if config.workspace else None,
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
        """The GPU's index among those that CUDA sees."""
        return int(self.name.partition(":")[2] or 0)

    @property
    def halves_graph(self) -> bool:
        """Whether to convert the graph itself to float16. TensorRT has an option of its own for that."""
        return self.fp16 and not self.tensorrt


CPU = Device()


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
