"""Which implementation of an operator runs: `auto`, `triton`, `fallback` or `reference`.

* "reference": the formula, readable, any dtype up to fp64.
* "fallback": plain torch with few launches; runs everywhere and is never slower than what it replaces.
* "triton": the fused kernels; they need a GPU, or Triton's interpreter (`TRITON_INTERPRET=1` set before the start),
  which is for tests: it is slow, and computes bf16 wrongly where no test mends it.
* "auto": "triton" on an NVIDIA GPU where the operator has a configuration for the case, else "fallback"; and "fallback"
  where the GPU's table (`lit_kernels.dispatch`) says that it was faster.

The choice is logged once for every operator and reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_kernels import dispatch
from lit_kernels.table_files import Key

Backend = Literal["auto", "triton", "fallback", "reference"]
Path = Literal["triton", "fallback", "reference"]
_WITHOUT_VALUES: ContextVar[bool] = ContextVar("without_values", default=False)
_INSTALLED = importlib.util.find_spec("triton") is not None
_PLAIN = (Tensor, nn.Parameter)
log = logging.getLogger(__name__)
# Whether a*b+c is rounded once: Triton changes its default, our numbers are not to change with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Within, a CPU's tensors take the paths of a GPU's: they are fake, nothing runs, and what would run is counted."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def why_not_triton(device: torch.device) -> str:
    """Why kernels cannot run on tensors of this device; empty where they can."""
    if not _INSTALLED:
        return "Triton is not installed"
    if device.type == "meta" or (device.type == "cuda" and torch.version.hip is None):
        return ""  # on the meta device nothing runs, and what would run can be counted
    if device.type == "cpu" and (interpreting() or _WITHOUT_VALUES.get()):
        return ""
    return f"Triton kernels need an NVIDIA GPU, not {device.type} (or TRITON_INTERPRET=1 set before the start)"


def choose(
    operator: str, backend: Backend, device: torch.device, unsupported: str = "", key: Key | None = None
) -> Path:
    """The path to take.

    Args:
        operator: For the log and for errors.
        unsupported: Why the kernels of this operator have no configuration for the case; empty where they have one.
        key: What "auto" looks up in the GPU's table; without one nothing is looked up.

    Raises:
        ValueError: No such backend, "triton" was asked for where it cannot run, or the GPU's table cannot be read.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(get_args(Backend))}")
    if backend in ("fallback", "reference"):
        return backend  # type: ignore[return-value]
    reason = why_not_triton(device) or unsupported
    if key is not None:
        dispatch.noted(key)
    if backend == "triton":
        if reason:
            raise ValueError(f"{operator}: {reason}; use backend='auto'")
        return "triton"
    if device.type == "cpu":  # the interpreter is for tests; nobody wants it by default
        reason = reason or "the interpreter is slow"
    if not reason and key is not None and dispatch.path(key, device) == "fallback":
        reason = "some sizes were measured to be faster so on this GPU"
    _tell(operator, "fallback" if reason else "triton", reason)
    return "fallback" if reason else "triton"


def launches_directly(x: Tensor) -> bool:
    """Whether kernels are launched without torch's registry of operators, which takes the host longer than a launch.

    Not in a graph that is being traced, for tensors without values (fake, meta), or where something watches what torch
    dispatches, such as a counter.
    """
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return type(x) in _PLAIN and not x.is_meta and not watched


def directly(name: str, launch: Callable[..., Any], save: Callable[..., None], gradients: Callable[..., Any]) -> Any:
    """An `autograd.Function` of a launch, with the `setup_context` and `backward` of the registered operator.

    Profilers show it under `name`.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own has the signature read in every call
        output = launch(*inputs)
        save(ctx, inputs, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(gradients))}
    return type(name, (torch.autograd.Function,), parts)


@dispatch.constant_while_traced  # compiled code cannot log; the choice is made, and told, while it is traced
def _tell(operator: str, path: str, reason: str) -> bool:
    return _told(operator, path, reason)


@functools.cache
def _told(operator: str, path: str, reason: str) -> bool:
    log.info("%s: %s%s", operator, path, f" ({reason})" if reason else "")
    return True
