"""A whole training step at real size, fused and not, side by side: time, CPU time and peak memory.

    python kernels/benchmarks/step.py --size sdxl --targets attention --batch 1 --out kernels/benchmarks/results

Weights and inputs are random; a step is forward, backward and AdamW of what is trained: LoRA factors (rank 8), or with
`--targets full_key_value` the K and V matrices of the text themselves, as Custom Diffusion does. Ways:

* stock: frozen bf16 UNet, what is trained in fp32, autocast: what diffusers' training scripts do with PEFT.
* casts_off: what is trained in bf16 and no autocast, so that nothing is cast.
* compiled_blocks, compiled: the same with `torch.compile` of each block, of the whole UNet.
* graph: casts_off with forward and backward in one CUDA graph.
* kernels, kernels_graph, kernels_compiled_blocks: `lit_kernels.patch`, what is trained in fp32, no autocast.

Each way is measured with stock beside it, in turn, so that a slower clock meets both and their ratio is of one run, and
no more than two UNets are in memory. One JSON file for each (size, targets, batch), left alone if
it is there: the same command goes on. `--size tiny` runs on a CPU, as a check of this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from counts import SIZES, TARGETS

import lit_kernels

WAYS = (
    "stock", "casts_off", "compiled_blocks", "compiled", "graph", "kernels", "kernels_graph", "kernels_compiled_blocks",
)  # fmt: skip
FULL = "full_key_value"
TINY = {
    "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1,
    "norm_num_groups": 8,
}  # fmt: skip


def build(size: str, targets: str, device: torch.device, factors: torch.dtype) -> Any:
    """A UNet in bf16 with LoRA, B not zero, or with text K and V that learn."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with device:
        unet = UNet2DConditionModel(**(TINY if size == "tiny" else SIZES[size]))
    unet = unet.to(torch.bfloat16).requires_grad_(False).train()
    if targets == FULL:
        for name, weight in unet.named_parameters():
            weight.requires_grad_(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
    elif targets != "none":
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS[targets], init_lora_weights=False))
    for module in unet.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.requires_grad:
            module.weight = torch.nn.Parameter(weight.detach().to(factors))
    return unet


def inputs(unet: Any, batch: int, device: torch.device) -> dict[str, Any]:
    """Arguments of the UNet's forward."""
    config, dtype = unet.config, torch.bfloat16
    given: dict[str, Any] = {
        "sample": torch.randn(batch, 4, config.sample_size, config.sample_size, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, device=device, dtype=dtype),
    }
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, device=device, dtype=dtype),
            "time_ids": torch.full((batch, 6), 1024.0, device=device, dtype=dtype),
        }
    return given


def prepare(way: str, size: str, targets: str, batch: int, device: torch.device) -> Callable[[], None]:
    """One step of a way, ready to be called."""
    ours = way.startswith("kernels")
    unet = build(size, targets, device, torch.float32 if ours or way == "stock" else torch.bfloat16)
    if ours:
        lit_kernels.patch(unet)
    given = inputs(unet, batch, device)
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if not learning:
        given["sample"].requires_grad_()
    optimizer = torch.optim.AdamW(learning, fused=device.type == "cuda") if learning else None
    if way.endswith("compiled_blocks"):
        unet.compile_repeated_blocks(fullgraph=False)
    model = torch.compile(unet) if way == "compiled" else unet
    cast = torch.autocast(device.type, torch.bfloat16) if way == "stock" else contextlib.nullcontext()

    def passes() -> None:
        with cast:
            out = model(**given).sample
        out.float().square().mean().backward()

    if way.endswith("graph"):
        passes = _captured(passes)

    def step() -> None:
        passes()
        if optimizer is not None:
            optimizer.step()
            for parameter in learning:
                if parameter.grad is not None:
                    parameter.grad.zero_() if way.endswith("graph") else setattr(parameter, "grad", None)

    return step


def _captured(passes: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    return graph.replay


def measure(ways: dict[str, Callable[[], None]], steps: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds a step, median of `steps`, the ways in turn."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    host: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(steps + 3):
        for way, step in ways.items():
            _wait(device)
            begun = time.perf_counter()
            step()
            issued = time.perf_counter()
            _wait(device)
            if turn >= 3:
                times[way].append(1000 * (time.perf_counter() - begun))
                host[way].append(1000 * (issued - begun))
    return {
        way: {"ms": statistics.median(times[way]), "cpu_ms": statistics.median(host[way])} for way in ways
    }


def beside_stock(
    way: str, size: str, targets: str, batch: int, steps: int, device: torch.device
) -> dict[str, float | None]:
    """Figures of a way, with the milliseconds of stock that took turns with it; both are gone afterwards."""
    ready, peak = {}, None
    for name in dict.fromkeys(("stock", way)):
        ready[name] = prepare(name, size, targets, batch, device)
        ready[name]()
        peak = peak_of(ready[name], device)
    times = measure(ready, steps, device)
    ready.clear()
    torch.compiler.reset()
    return {**times[way], "stock_ms": times["stock"]["ms"], "peak_gb": peak}


def peak_of(step: Callable[[], None], device: torch.device) -> float | None:
    """Gigabytes at most allocated in a step beyond what was there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("tiny", *SIZES), required=True)
    parser.add_argument("--targets", choices=(*TARGETS, FULL), default="attention")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    path = given.out / f"step-{given.size}-{given.targets}-batch{given.batch}.json"
    if path.exists():
        print(f"{path} is there")
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and given.size != "tiny":
        print("a step at real size needs a GPU; --size tiny checks this file on a CPU", file=sys.stderr)
        return 2
    usual = WAYS if device.type == "cuda" else ("stock", "casts_off", "kernels")
    found: dict[str, dict[str, float | None]] = {}
    failed = {}
    for way in given.ways or usual:
        try:
            found[way] = beside_stock(way, given.size, given.targets, given.batch, given.steps, device)
        except Exception as error:  # noqa: BLE001 - one way that cannot run here leaves the others; it is written down
            failed[way] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{way}: {failed[way]}", file=sys.stderr)
            continue
        line = f"{way:24} {found[way]['ms']:9.2f} ms, stock {found[way]['stock_ms']:9.2f} ms"
        peak = found[way]["peak_gb"]
        print(f"{line}, {found[way]['cpu_ms']:9.2f} ms of the CPU" + ("" if peak is None else f" {peak:8.2f} GB"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "size": given.size, "targets": given.targets, "batch": given.batch, "steps": given.steps,
        "ways": found, "failed": failed,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
