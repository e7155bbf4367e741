"""The config of a net: the local files and the options of its release, parsed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluator.limits import Limits
from evaluator.options import Options

SCRIPT = "net.py"
"""The tar member that makes a release scripted."""

DEFAULT_NET = "classify"
"""The built-in net of a release that has no script and names no net."""

Cfg = dict[str, Any]
"""The config as ``net_init`` of a ``net.py`` gets it: ``tar_files`` and ``custom_files`` (local paths by name),
``custom_values``, ``model_params``, ``use_device``, ``image_width`` and ``batch_size`` (None if not set)."""


@dataclass(frozen=True)
class NetConfig:
    """The config of one net. Only a ``net.py`` sees it as a dict, by :meth:`to_cfg`."""

    tar_files: Mapping[str, Path]
    """The files of the tar by name."""
    custom_files: Mapping[str, Path] = field(default_factory=dict)
    custom_values: Options = field(default_factory=lambda: Options("custom_values", {}))
    model_params: Options = field(default_factory=lambda: Options("model_params", {}))
    workspace: Path | None = None
    """A folder for the files of this instance's worker; None for a net outside an instance, which writes none."""
    image_width: int | None = None
    batch_size: int | None = None
    use_device: str = "CPU"

    @staticmethod
    def from_cfg(cfg: Mapping[str, Any]) -> NetConfig:
        """Read the dict of :meth:`to_cfg`. A script may leave out fields."""
        custom_values = dict(cfg.get("custom_values", {}))
        workspace = custom_values.pop("workspace", None)
        return NetConfig(
            tar_files={name: Path(path) for name, path in cfg.get("tar_files", {}).items()},
            custom_files={name: Path(path) for name, path in cfg.get("custom_files", {}).items()},
            custom_values=Options("custom_values", custom_values),
            model_params=Options("model_params", cfg.get("model_params", {})),
            workspace=Path(workspace) if workspace else None,
            image_width=cfg.get("image_width"),
            batch_size=cfg.get("batch_size"),
            use_device=cfg.get("use_device", "CPU"),
        )

    def to_cfg(self) -> Cfg:
        """Return the config as ``net_init`` of a ``net.py`` gets it; JSON can hold it."""
        workspace = {"workspace": str(self.workspace)} if self.workspace else {}
        return {
            "tar_files": {name: str(path) for name, path in self.tar_files.items()},
            "custom_files": {name: str(path) for name, path in self.custom_files.items()},
            "custom_values": {**self.custom_values.fields, **workspace},
            "model_params": dict(self.model_params.fields),
            "image_width": self.image_width,
            "batch_size": self.batch_size,
            "use_device": self.use_device,
        }

    @property
    def script(self) -> Path | None:
        """The release's ``net.py``; None for a built-in net."""
        return self.tar_files.get(SCRIPT)

    @property
    def net(self) -> str:
        """The name of the built-in net, which need not exist; ``net.py`` for a script."""
        return SCRIPT if self.script else str(self.custom_values.fields.get("net", DEFAULT_NET))

    @cached_property
    def limits(self) -> Limits:
        """The limits of requests. Raises StartError."""
        return Limits.of_release(self.custom_values)

    def with_threads(self, threads: int) -> NetConfig:
        """Return the config with ``intra_op_threads`` set; 0 leaves it as it is."""
        if not threads:
            return self
        return replace(self, model_params=self.model_params.having(intra_op_threads=threads))
