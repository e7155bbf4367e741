"""The converters, one module a family of layers.

Every module here registers its converters when it is imported, and every module here is imported, so that adding a
layer is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil

from .converters import CONVERTERS, Blobs, LayerContext

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CONVERTERS", "Blobs", "LayerContext"]
