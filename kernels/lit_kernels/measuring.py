"""Every operator at the sizes of SD1.5@512 and SDXL@1024: bytes, FLOPs, the limit that they set, and on a GPU the time.

Bytes are the least that has to be read and written (every tensor once), FLOPs those of the formula; both are counted
from shapes. The limit, max(FLOPs / peak, bytes / bandwidth), is modelled. Times are medians of Triton's `do_bench` with
a cold L2, of the kernels with the tiles of the GPU's table, of plain torch and of every baseline (`lit_kernels.
baselines`) side by side; without a GPU there are none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_kernels.absorbed_attention.function import absorb, absorbed_attention
from lit_kernels.bank_adamw.function import bank_adamw
from lit_kernels.bank_lora.function import bank_lora
from lit_kernels.baselines import Baseline, baselines_of, plain_of
from lit_kernels.frozen_geglu.function import frozen_geglu
from lit_kernels.packing import lay_side_by_side
from lit_kernels.short_key_attention.function import short_key_attention
from lit_kernels.text_kv.function import text_key_values
from lit_kernels.timing import Bench, do_bench, passes_of

PEAKS: dict[str, tuple[float, float]] = {"H200": (790e12, 4.3e12), "A100": (312e12, 2.0e12)}
"""bf16 FLOP/s and bytes/s by a part of the device's name; the first is what the limit is modelled for without a GPU."""
MODELS: dict[str, dict[str, Any]] = {
    # width of text; then layers: (width, heads, image tokens, how many)
    "sd15": {"text": 768, "layers": [(320, 8, 4096, 5), (640, 8, 1024, 5), (1280, 8, 256, 5), (1280, 8, 64, 1)]},
    "sdxl": {"text": 2048, "layers": [(640, 10, 4096, 10), (1280, 20, 1024, 60)]},
}
BANK = {"adapters": 32, "width": 320, "tokens": 4096, "parameters": 99_648}
"""Of W2W: SD1.5's widest maps, two pictures an adapter, and the parameters of one."""
TOKENS = 77
RANK = 8
SCALE = 0.5


@dataclass
class Built:
    """A case's inputs on a device."""

    run: Callable[[Any], Any]
    """Of the backend; returns what a backward pass can begin with."""
    learning: list[Tensor]
    """Inputs that learn."""
    given: dict[str, Any]
    """All inputs by name, for baselines."""


@dataclass
class Case:
    """One operator at one size."""

    operator: str
    size: str
    bytes: int
    flops: int
    build: Callable[[torch.device], Built]
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
    baselines: dict[str, float | str] = field(default_factory=dict)
    """Time of each baseline, or why it has none."""

    @property
    def share(self) -> float | None:
        """Of the limit that is reached."""
        return None if self.time_us is None else self.limit_us / self.time_us

    @property
    def ratio(self) -> float | None:
        return None if self.time_us is None or self.torch_us is None else self.torch_us / self.time_us

    @property
    def ratios(self) -> dict[str, float]:
        """Time of each baseline that has one / time of the kernels; "best SDPA" is the fastest of torch's own."""
        if self.time_us is None:
            return {}
        found = {name: time / self.time_us for name, time in self.baselines.items() if not isinstance(time, str)}
        attentions = [ratio for name, ratio in found.items() if name.startswith("SDPA ")]
        return {**found, "best SDPA": min(attentions)} if attentions else found


def cases(
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    models: Mapping[str, dict[str, Any]] = MODELS,
    bank: Mapping[str, int] = BANK,
) -> Iterator[Case]:
    """Every operator at every size that a step of the models has."""
    for model, shape in models.items():
        yield _text_kv(model, shape, batch, dtype)
        for width, heads, tokens, _ in shape["layers"]:
            yield _short_keys(model, width, heads, tokens, batch, dtype)
        for width, _, tokens, _ in shape["layers"]:
            yield _bank_lora(model, width, tokens, batch, 1, dtype)
        for width, _, tokens, _ in shape["layers"]:
            yield _frozen_geglu(model, 4 * width, tokens, batch, dtype)
        for width, heads, tokens, _ in shape["layers"]:
            yield _absorbed(model, width, heads, tokens, batch, dtype)
    yield _bank_lora("sd15", bank["width"], bank["tokens"], 2 * bank["adapters"], bank["adapters"], dtype)
    yield _bank_adamw(bank["adapters"], bank["parameters"])


def peaks_of(device: torch.device | None) -> tuple[str, float, float]:
    """Name, FLOP/s and bytes/s of the GPU that limits are modelled for: this one if its peaks are known."""
    found = "" if device is None else torch.cuda.get_device_name(device)
    name = next((name for name in PEAKS if name in found), next(iter(PEAKS)))
    return name, *PEAKS[name]


def measure(chosen: Sequence[Case], device: torch.device | None) -> Iterator[Row]:
    """Rows of the cases, with times if `device` is a GPU."""
    _, flops, bandwidth = peaks_of(device)
    for case in chosen:
        times = times_of(case, device, do_bench) if device is not None else {}
        for direction, moved, done in (
            ("forward", case.bytes, case.flops),
            ("backward", case.backward_bytes, case.backward_flops),
        ):
            if not moved:
                continue
            by_flops, by_bytes = done / flops, moved / bandwidth
            found = {name: time if isinstance(time, str) else time[direction] for name, time in times.items()}
            ours, plain = (found.pop(backend, None) for backend in ("triton", "fallback"))
            yield Row(
                case.operator, case.size, direction, moved / 1e6, done / 1e9, 1e6 * max(by_flops, by_bytes),
                "arithmetic" if by_flops > by_bytes else "memory",
                None if isinstance(ours, str) else ours, None if isinstance(plain, str) else plain, found,
            )  # fmt: skip


def times_of(case: Case, device: torch.device, bench: Bench) -> dict[str, dict[str, float] | str]:
    """Time of each pass of "triton", "fallback" and every baseline, by name; or why there is none."""
    built = case.build(device)
    ours = ("triton", "fallback")
    ways: dict[str, Callable[[], Baseline]] = {
        backend: functools.partial(Baseline, functools.partial(built.run, backend), built.learning)
        for backend in ours
    }
    ways |= baselines_of(case.operator, built.given)
    run = functools.partial(built.run, "triton")
    ways["ours in a graph"] = functools.partial(Baseline, run, built.learning, graphed=True)
    found: dict[str, dict[str, float] | str] = {}
    for name, make in ways.items():
        try:
            found[name] = passes_of(make(), bench)
        except Exception as error:  # noqa: BLE001 - what cannot run here leaves the others; it is written down
            if name in ours:
                raise
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, learns: bool = True) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(learns)


def _text_kv(model: str, shape: dict[str, Any], batch: int, dtype: torch.dtype) -> Case:
    widths = [width for width, _, _, count in shape["layers"] for _ in range(2 * count)]
    rows, depth, total, slices = batch * TOKENS, shape["text"], sum(widths), len(widths)

    def build(device: torch.device) -> Built:
        text = _draw(device, batch, TOKENS, depth, dtype=dtype, learns=False)
        weights = list(_draw(device, total, depth, dtype=dtype, learns=False).split(widths))
        downs = [_draw(device, RANK, depth, dtype=torch.float32) for _ in widths]
        ups = [_draw(device, width, RANK, dtype=torch.float32) for width in widths]
        lay_side_by_side(downs)  # as in a patched UNet
        lay_side_by_side(ups)
        scales = torch.full((slices,), SCALE, device=device)
        given = {"text": text, "weights": weights, "downs": downs, "ups": ups, "scales": scales, "scale": SCALE}
        run = lambda backend: text_key_values(text, weights, downs, ups, scales, False, backend)  # noqa: E731
        return Built(run, downs + ups, given)

    item, factors = dtype.itemsize, RANK * (total + slices * depth)
    return Case(
        "text_kv", f"{model} all layers, batch {batch}",
        item * (rows * depth + total * depth + rows * total) + 4 * factors,
        2 * rows * (total * depth + factors), build,
        item * (rows * total + rows * depth) + 8 * factors, 2 * rows * RANK * (2 * total + slices * depth),
    )  # fmt: skip


def _short_keys(model: str, width: int, heads: int, tokens: int, batch: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> Built:
        query = _draw(device, batch, tokens, width, dtype=dtype)
        key, value = (_draw(device, batch, TOKENS, width, dtype=dtype) for _ in range(2))
        given = {"query": query, "key": key, "value": value, "heads": heads}
        run = lambda backend: short_key_attention(query, key, value, heads, backend=backend)  # noqa: E731
        return Built(run, [query, key, value], given)

    image, text = dtype.itemsize * batch * tokens * width, dtype.itemsize * batch * TOKENS * width
    product = 2 * batch * tokens * TOKENS * width
    size = f"{model} {width} wide, {heads} heads, {tokens} tokens, batch {batch}"
    moved, moved_back = 2 * image + 2 * text, 3 * image + 4 * text
    return Case("short_key_attention", size, moved, 2 * product, build, moved_back, 5 * product)


def _bank_lora(model: str, width: int, tokens: int, batch: int, adapters: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> Built:
        x = _draw(device, batch, tokens, width, dtype=dtype)
        weight = _draw(device, width, width, dtype=dtype, learns=False)
        downs = _draw(device, adapters, RANK, width, dtype=torch.float32)
        ups = _draw(device, adapters, width, RANK, dtype=torch.float32)
        scales = torch.full((adapters,), SCALE, device=device)
        given = {"x": x, "weight": weight, "downs": downs, "ups": ups, "scales": scales, "scale": SCALE}
        return Built(lambda backend: bank_lora(x, weight, downs, ups, scales, None, backend), [x, downs, ups], given)

    rows = batch * tokens
    image, factors = dtype.itemsize * rows * width, 2 * adapters * RANK * width
    matrix, side = dtype.itemsize * width * width, 4 * rows * RANK * width
    size = f"{model} {width} to {width}, {tokens} tokens, batch {batch}, {adapters} adapter{'s' * (adapters > 1)}"
    return Case(
        "bank_lora", size, 2 * image + matrix + 4 * factors, 2 * rows * width * width + side, build,
        3 * image + matrix + 8 * factors, 2 * rows * width * width + 2 * side,
    )  # fmt: skip


def _frozen_geglu(model: str, width: int, tokens: int, batch: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> Built:
        projected = _draw(device, batch, tokens, 2 * width, dtype=dtype)
        return Built(lambda backend: frozen_geglu(projected, backend), [projected], {"projected": projected})

    half = dtype.itemsize * batch * tokens * width
    size = f"{model} {width} wide, {tokens} tokens, batch {batch}"
    # Some 10 operations for a GELU and 20 for its derivative; no product.
    return Case("frozen_geglu", size, 3 * half, 10 * half // 2, build, 5 * half, 30 * half // 2)


def _absorbed(model: str, width: int, heads: int, tokens: int, batch: int, dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> Built:
        x = _draw(device, batch, tokens, width, dtype=dtype, learns=False)
        key, value = (_draw(device, batch, TOKENS, width, dtype=dtype, learns=False) for _ in range(2))
        w_q, w_o = (_draw(device, width, width, dtype=dtype, learns=False) / width**0.5 for _ in range(2))
        absorbed = absorb(key, value, w_q, w_o, heads)
        given = {"x": x, "key": key, "value": value, "heads": heads, "query_weight": w_q, "out_weight": w_o}
        layer = plain_of("absorbed_attention", given)  # what absorbing replaces

        def run(backend: Any) -> Tensor:
            return layer() if backend == "fallback" else absorbed_attention(x, absorbed, backend)

        return Built(run, [], given)

    image, text = dtype.itemsize * batch * tokens * width, dtype.itemsize * batch * heads * TOKENS * width
    size = f"{model} {width} wide, {heads} heads, {tokens} tokens, batch {batch}"
    return Case("absorbed_attention", size, 2 * image + 2 * text, 4 * batch * tokens * heads * TOKENS * width, build)


def _bank_adamw(adapters: int, parameters: int) -> Case:
    def build(device: torch.device) -> Built:
        weight, grad = (torch.randn(adapters, parameters, device=device) for _ in range(2))
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        step = torch.zeros(adapters, dtype=torch.int64, device=device)
        shadow = torch.empty_like(weight, dtype=torch.bfloat16)
        # A norm so small that beside eps the first step shows whether it was clipped; times do not depend on it.
        options = {"lr": 1e-2, "decay": 0.01, "norm": 1e-6}
        rate, decay, norm = (torch.full_like(weight[:, 0], value) for value in options.values())
        given = {"weight": weight, "first": first, "second": second, "grad": grad, "step": step, "shadow": shadow}

        def run(backend: Any) -> list[Tensor]:
            bank_adamw(weight, first, second, grad, rate, decay, step, norm, shadow_GP=shadow, backend=backend)
            return list(weight)

        return Built(run, [], {**given, **options})

    numbers = adapters * parameters
    # The gradient is read twice, first for its norm; weight, moments and shadow are written.
    return Case("bank_adamw", f"{adapters} adapters of {parameters} parameters", 34 * numbers, 15 * numbers, build)


def as_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "share_of_limit": row.share, "ratio": row.ratio, "ratios": row.ratios} for row in rows]
