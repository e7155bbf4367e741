"""The layer converters, one module per family of layers.

This package imports all of its modules, and each registers its converters on import. To add a layer, add a module.
"""

from __future__ import annotations

import importlib
import pkgutil

from .converters import CONVERTERS, LayerContext, WeightSource

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CONVERTERS", "LayerContext", "WeightSource"]
