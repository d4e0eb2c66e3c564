"""Kernel tests run on poisoned memory, with a Triton interpreter that knows bf16, on a GPU where there is one.

* An output element that no kernel writes is NaN, never a lucky zero.
* Triton's interpreter adds and multiplies the bits of bf16 numbers as integers. Here its products widen them and its
  casts round to nearest even, as GPUs do; any other arithmetic on bf16 is an error: kernels must not do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **options: Any) -> torch.Tensor:
        tensor = allocate(*args, **options)
        if tensor.is_meta or tensor.layout != torch.strided or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its relatives return with NaN (integers: their largest value)."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make bf16 right in Triton's interpreter: dots and casts as on a GPU, everything else an error."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, binary = (getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "binary_op"))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *options)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16 or source.dtype.scalar == tl.bfloat16:
            return cast(self, widened(source), to) if source.dtype.scalar == tl.bfloat16 else cast(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("arithmetic on bf16: cast to the accumulator's dtype first")
        return binary(self, lhs, rhs, op)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "binary_op", binary_op)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, cast_impl)


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; kernels run in the interpreter on the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


Named = Mapping[str, torch.Tensor]


@pytest.fixture
def agree() -> Callable[[Named, Named, Named], None]:
    """`agree(found, plain, exact)`: by name, `found` errs at most twice as much as `plain` torch in the same dtype.

    `exact` is the fp64 result. Gradients (names that begin with "d") may err three times as much; a little more is
    let pass where plain torch happens to be exact.
    """

    def check(found: Named, plain: Named, exact: Named) -> None:
        assert found.keys() == plain.keys() == exact.keys()
        for name, value in found.items():
            truth = exact[name].double()
            assert value.dtype == plain[name].dtype and value.shape == truth.shape, name
            assert bool(value.isfinite().all()), f"{name} is not finite"
            error, usual = ((x.double() - truth).abs().max().item() for x in (value, plain[name]))
            floor = 2 * torch.finfo(value.dtype).eps * truth.abs().max().item()
            allowed = (3 if name.startswith("d") else 2) * usual + floor
            assert error <= allowed, f"{name}: error {error:.3g}, plain torch {usual:.3g}, allowed {allowed:.3g}"

    return check
