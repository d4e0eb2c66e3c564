"""Every operator at the sizes of SD1.5@512 and SDXL@1024: bytes, FLOPs, the limit that they set, and on a GPU the time.

Bytes are the least that has to be read and written (every tensor once), FLOPs those of the formula; both are counted
from shapes. The limit, max(FLOPs / peak, bytes / bandwidth), is modelled. Times are medians of Triton's `do_bench` with
a cold L2, of the kernels and of plain torch side by side; without a GPU there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lit_kernels.absorbed_attention.function import Absorbed, absorbed_attention
from lit_kernels.bank_adamw.function import bank_adamw
from lit_kernels.bank_lora.function import bank_lora
from lit_kernels.frozen_geglu.function import frozen_geglu
from lit_kernels.short_key_attention.function import short_key_attention
from lit_kernels.text_kv.function import text_key_values

PEAKS: dict[str, tuple[float, float]] = {"H200": (790e12, 4.3e12), "A100": (312e12, 2.0e12)}
"""bf16 FLOP/s and bytes/s by a part of the device's name; the first is what the limit is modelled for without a GPU."""
MODELS: dict[str, dict[str, Any]] = {
    # width of text; then layers: (width, heads, image tokens, how many)
    "sd15": {"text": 768, "layers": [(320, 8, 4096, 5), (640, 8, 1024, 5), (1280, 8, 256, 5), (1280, 8, 64, 1)]},
    "sdxl": {"text": 2048, "layers": [(640, 10, 4096, 10), (1280, 20, 1024, 60)]},
}
TOKENS = 77
RANK = 8


@dataclass
class Case:
    """One operator at one size; `run(backend)` returns what a backward pass can begin with."""

    operator: str
    size: str
    bytes: int
    flops: int
    build: Callable[[torch.device], tuple[Callable[[str], Any], list[Tensor]]]
    """Inputs on a device: a function of the backend, and the inputs that learn."""
    backward_bytes: int = 0
    backward_flops: int = 0


@dataclass
class Row:
    """A line of the table; times in microseconds, `ratio` = time of plain torch / time of the kernels."""

    operator: str
    size: str
    direction: str
    megabytes: float
    gigaflops: float
    limit_us: float
    limited_by: str
    time_us: float | None = None
    torch_us: float | None = None

    @property
    def share(self) -> float | None:
        """Of the limit that is reached."""
        return None if self.time_us is None else self.limit_us / self.time_us

    @property
    def ratio(self) -> float | None:
        return None if self.time_us is None or self.torch_us is None else self.torch_us / self.time_us


def cases(batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Every operator at every size that a step of the models has."""
    for model, shape in MODELS.items():
        yield _text_kv(model, shape, batch, dtype)
        for width, heads, tokens, _ in shape["layers"]:
            yield _short_keys(model, width, heads, tokens, batch, dtype)
        for width, _, tokens, _ in shape["layers"]:
            yield _bank_lora(model, width, tokens, batch, 1, dtype)
        for width, _, tokens, _ in shape["layers"]:
            yield _frozen_geglu(model, 4 * width, tokens, batch, dtype)
        for width, heads, tokens, _ in shape["layers"]:
            yield _absorbed(model, width, heads, tokens, batch, dtype)
    yield _bank_lora("sd15", 320, 4096, 2 * 32, 32, dtype)
    yield _bank_adamw(32, 99_648)


def peaks_of(device: torch.device | None) -> tuple[str, float, float]:
    """Name, FLOP/s and bytes/s of the GPU that limits are modelled for: this one if its peaks are known."""
    found = "" if device is None else torch.cuda.get_device_name(device)
    name = next((name for name in PEAKS if name in found), next(iter(PEAKS)))
    return name, *PEAKS[name]


def measure(chosen: Sequence[Case], device: torch.device | None) -> Iterator[Row]:
    """Rows of the cases, with times if `device` is a GPU."""
    _, flops, bandwidth = peaks_of(device)
    for case in chosen:
        times = _times(case, device) if device is not None else {}
        for direction, moved, done in (
            ("forward", case.bytes, case.flops),
            ("backward", case.backward_bytes, case.backward_flops),
        ):
            if not moved:
                continue
            by_flops, by_bytes = done / flops, moved / bandwidth
            yield Row(
                case.operator, case.size, direction, moved / 1e6, done / 1e9, 1e6 * max(by_flops, by_bytes),
                "arithmetic" if by_flops > by_bytes else "memory", times.get((direction, "triton")),
                times.get((direction, "fallback")),
            )  # fmt: skip


def _times(case: Case, device: torch.device) -> dict[tuple[str, str], float]:
    from triton.testing import do_bench

    run, learning = case.build(device)
    found = {}
    for backend in ("triton", "fallback"):
        found["forward", backend] = 1000 * float(do_bench(lambda b=backend: run(b), return_mode="median"))
        if case.backward_bytes:
            out = run(backend)
            outs = [out] if isinstance(out, Tensor) else list(out)
            grads = [torch.ones_like(y) for y in outs]
            found["backward", backend] = 1000 * float(
                do_bench(
                    lambda o=outs, g=grads: torch.autograd.grad(o, learning, g, retain_graph=True), return_mode="median"
                )
            )
    return found


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, learns: bool = True) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(learns)


def _text_kv(model: str, shape: dict[str, Any], batch: int, dtype: torch.dtype) -> Case:
    widths = [width for width, _, _, count in shape["layers"] for _ in range(2 * count)]
    rows, depth, total, slices = batch * TOKENS, shape["text"], sum(widths), len(widths)

    def build(device: torch.device) -> tuple[Callable[[str], Any], list[Tensor]]:
        text = _draw(device, batch, TOKENS, depth, dtype=dtype, learns=False)
        weights = list(_draw(device, total, depth, dtype=dtype, learns=False).split(widths))
        downs = [_draw(device, RANK, depth, dtype=torch.float32) for _ in widths]
        ups = [_draw(device, width, RANK, dtype=torch.float32) for width in widths]
        scales = torch.ones(slices, device=device)
        return lambda backend: text_key_values(text, weights, downs, ups, scales, False, backend), downs + ups  # type: ignore[arg-type]

    item, factors = dtype.itemsize, RANK * (total + slices * depth)
    return Case(
        "text_kv", f"{model} all layers, batch {batch}",
        item * (rows * depth + total * depth + rows * total) + 4 * factors,
        2 * rows * (total * depth + factors), build,
        item * (rows * total + rows * depth) + 8 * factors, 2 * rows * RANK * (2 * total + slices * depth),
    )  # fmt: skip


def _short_keys(model: str, width: int, heads: int, tokens: int, batch: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> tuple[Callable[[str], Any], list[Tensor]]:
        query = _draw(device, batch, tokens, width, dtype=dtype)
        key, value = (_draw(device, batch, TOKENS, width, dtype=dtype) for _ in range(2))
        return lambda backend: short_key_attention(query, key, value, heads, backend=backend), [query, key, value]  # type: ignore[call-overload, no-any-return]

    image, text = dtype.itemsize * batch * tokens * width, dtype.itemsize * batch * TOKENS * width
    product = 2 * batch * tokens * TOKENS * width
    size = f"{model} {width} wide, {heads} heads, {tokens} tokens, batch {batch}"
    moved, moved_back = 2 * image + 2 * text, 3 * image + 4 * text
    return Case("short_key_attention", size, moved, 2 * product, build, moved_back, 5 * product)


def _bank_lora(model: str, width: int, tokens: int, batch: int, adapters: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> tuple[Callable[[str], Any], list[Tensor]]:
        x = _draw(device, batch, tokens, width, dtype=dtype)
        weight = _draw(device, width, width, dtype=dtype, learns=False)
        downs = _draw(device, adapters, RANK, width, dtype=torch.float32)
        ups = _draw(device, adapters, width, RANK, dtype=torch.float32)
        scales = torch.ones(adapters, device=device)
        return lambda backend: bank_lora(x, weight, downs, ups, scales, None, backend), [x, downs, ups]  # type: ignore[arg-type]

    rows = batch * tokens
    image, factors = dtype.itemsize * rows * width, 2 * adapters * RANK * width
    matrix, side = dtype.itemsize * width * width, 4 * rows * RANK * width
    size = f"{model} {width} to {width}, {tokens} tokens, batch {batch}, {adapters} adapter{'s' * (adapters > 1)}"
    return Case(
        "bank_lora", size, 2 * image + matrix + 4 * factors, 2 * rows * width * width + side, build,
        3 * image + matrix + 8 * factors, 2 * rows * width * width + 2 * side,
    )  # fmt: skip


def _frozen_geglu(model: str, width: int, tokens: int, batch: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> tuple[Callable[[str], Any], list[Tensor]]:
        projected = _draw(device, batch, tokens, 2 * width, dtype=dtype)
        return lambda backend: frozen_geglu(projected, backend), [projected]  # type: ignore[arg-type]

    half = dtype.itemsize * batch * tokens * width
    size = f"{model} {width} wide, {tokens} tokens, batch {batch}"
    # Some 10 operations for a GELU and 20 for its derivative; no product.
    return Case("frozen_geglu", size, 3 * half, 10 * half // 2, build, 5 * half, 30 * half // 2)


def _absorbed(model: str, width: int, heads: int, tokens: int, batch: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> tuple[Callable[[str], Any], list[Tensor]]:
        x = _draw(device, batch, tokens, width, dtype=dtype, learns=False)
        text = (_draw(device, batch, heads, TOKENS, width, dtype=dtype, learns=False) for _ in range(2))
        absorbed = Absorbed(*text)
        return lambda backend: absorbed_attention(x, absorbed, backend), []  # type: ignore[arg-type]

    image, text = dtype.itemsize * batch * tokens * width, dtype.itemsize * batch * heads * TOKENS * width
    size = f"{model} {width} wide, {heads} heads, {tokens} tokens, batch {batch}"
    return Case("absorbed_attention", size, 2 * image + 2 * text, 4 * batch * tokens * heads * TOKENS * width, build)


def _bank_adamw(adapters: int, parameters: int) -> Case:
    def build(device: torch.device) -> tuple[Callable[[str], Any], list[Tensor]]:
        weight, grad = (torch.randn(adapters, parameters, device=device) for _ in range(2))
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        rate = torch.full((adapters,), 1e-4, device=device)
        step = torch.zeros(adapters, dtype=torch.int64, device=device)
        shadow = torch.empty_like(weight, dtype=torch.bfloat16)
        decay, norm = torch.full_like(rate, 0.01), torch.full_like(rate, 1.0)
        return lambda backend: bank_adamw(
            weight, first, second, grad, rate, decay, step, norm, shadow_GP=shadow, backend=backend  # type: ignore[arg-type]
        ), []

    numbers = adapters * parameters
    # The gradient is read twice, first for its norm; weight, moments and shadow are written.
    return Case("bank_adamw", f"{adapters} adapters of {parameters} parameters", 34 * numbers, 15 * numbers, build)


def as_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "share_of_limit": row.share, "ratio": row.ratio} for row in rows]
