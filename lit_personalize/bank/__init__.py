"""Many adapters trained in one batched pass over one frozen base, each as if it were alone.

The classes load on first use: the job table and its claims (`job_table`, `claims`, `progress`) need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_personalize.bank.engine import Bank
    from lit_personalize.bank.job import AdapterJob, FinishedAdapter
    from lit_personalize.bank.pictures import Pictures

__all__ = ["AdapterJob", "Bank", "FinishedAdapter", "Pictures"]
_MODULES = {"AdapterJob": "job", "Bank": "engine", "FinishedAdapter": "job", "Pictures": "pictures"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
