"""Teach text-to-image diffusion models new concepts, and export adapters that any client loads.

The public functions mirror the verbs of `litp`. They load on first use: importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> (module, function). `export_adapter` is not called `export`, because importing the
# sub-package `lit_personalize.export` would replace a function of that name.
_PUBLIC = {
    "fit": ("lit_personalize.fitting", "fit"),
    "sample": ("lit_personalize.sampling.sampler", "sample"),
    "merge": ("lit_personalize.merging.merge", "merge"),
    "evaluate": ("lit_personalize.metrics.evaluation", "evaluate"),
    "export_adapter": ("lit_personalize.export.exporter", "export"),
    "verify": ("lit_personalize.export.verify", "verify"),
    "import_adapter": ("lit_personalize.export.importing", "import_files"),
    "load_adapter": ("lit_personalize.export.loading", "load_adapter"),
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")
    module, function = _PUBLIC[name]
    return getattr(import_module(module), function)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
