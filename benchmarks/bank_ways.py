"""One way to train Weights2Weights' adapters, measured in this process: what `bank_hours.py` starts for each way.

The recipe is read from `recipes/weights2weights/sd15.yaml`. In all ways latents of the pictures and text states are
there before the first step, and a step draws from the posterior of one instance and one prior picture. Modules are
imported where a way needs them, so that the start-up of a stock script is that of a stock script.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "weights2weights/sd15"
STOCK, EAGER, GRAPH, BANK = "stock", "persistent eager", "persistent compile+graph", "bank"
PROMPTS = ("sks person", "person")
PICTURES = (10, 200)
"""Of an adapter, and of its class."""
BLOCKS, TRACED, LONGEST = 5, 2, 10
KINDS = {
    "everything else": r"triton_(poi|red|per)_",  # Inductor names its elementwise kernels by what they are fused to
    "copies": r"memcpy|memset",
    "attention": r"flash|fmha|sdpa|attention|attn|short_key|absorbed",
    "convolutions": r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm|winograd",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|::mm|addmm|bmm|bank_lora|triton_tem",
}
"""By names of kernels, and on a CPU of operators; the first that fits counts."""


def recipe() -> dict[str, Any]:
    """What the shipped recipe says: LoRA, optimizer, weight of the prior, clipping, precision and steps."""
    read = yaml.safe_load((ROOT / f"lit_personalize/recipes/{RECIPE}.yaml").read_text(encoding="utf-8"))
    model, trainer = read["model"]["init_args"], read["trainer"]
    return {
        "lora": model["adapters"][0]["init_args"], "optimizer": model["optimizer"]["init_args"],
        "prior_weight": model["prior_weight"], "dtype": model["dtype"],
        "clip": trainer["gradient_clip_val"], "steps": trainer["max_steps"],
    }  # fmt: skip


def kernel_sizes() -> Any:
    """`kernels/benchmarks/counts.py`, which knows the sizes of real UNets and PEFT's names of what trains."""
    sys.path.append(str(ROOT / "kernels/benchmarks"))
    import counts

    return counts


# ---- the ways -------------------------------------------------------------------------------------


def stock(base: Path, device: torch.device, compiled: bool = False) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step as diffusers' and PEFT's scripts make it, and the encoding of pictures and captions, which they repeat.

    UNet in bf16, LoRA in fp32, autocast, torch's AdamW, clipping, and the loss read at every step for the progress bar.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    given = recipe()
    dtype = getattr(torch, given["dtype"])
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=dtype).to(device)
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=dtype).to(device).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=dtype).to(device).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    targets = kernel_sizes().TARGETS[given["lora"]["targets"]]
    unet.requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=given["lora"]["rank"], lora_alpha=given["lora"]["alpha"], target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, **given["optimizer"])
    model = torch.compile(unet, mode="reduce-overhead") if compiled else unet

    ids = tokenizer(
        list(PROMPTS), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids.to(device)
    side = unet.config.sample_size
    pixels = torch.rand(len(PROMPTS), 3, *[side * 2 ** (len(vae.config.block_out_channels) - 1)] * 2, device=device)
    posteriors = [torch.randn(n, unet.config.in_channels, side, side, device=device) for n in PICTURES]

    @torch.no_grad()
    def encode() -> torch.Tensor:
        vae.encode((2 * pixels - 1).to(dtype)).latent_dist.sample()
        states: torch.Tensor = text(ids)[0]
        return states

    states, turns = encode(), itertools.count()

    def step() -> None:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        turn = next(turns)
        mean = torch.stack([each[turn % len(each)] for each in posteriors])
        z = (mean + 0.1 * torch.randn_like(mean)) * vae.config.scaling_factor
        noise = torch.randn_like(z)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(z),), device=device)
        with torch.autocast(device.type, dtype):
            predicted = model(scheduler.add_noise(z, noise, t), t, states).sample
        instance, prior = (predicted.float() - noise).square().chunk(2)
        loss = instance.mean() + given["prior_weight"] * prior.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, given["clip"])
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")

    return step, encode


def bank(base: Path, slots: int, device: torch.device) -> Callable[[], None]:
    """A step of a full bank of `slots` adapters."""
    from lit_personalize.adapters.lora import LoRA
    from lit_personalize.bank import AdapterJob, Bank, Pictures
    from lit_personalize.objectives.prior_preservation import PriorPreservation

    given = recipe()
    optimizer = functools.partial(torch.optim.AdamW, **given["optimizer"])
    lora = LoRA(**given["lora"])
    objective = PriorPreservation(
        str(base), [lora], optimizer, dtype=given["dtype"], prior_weight=given["prior_weight"]
    )  # fmt: skip
    many = Bank(objective, slots, clip=given["clip"], device=device)
    built = objective.built
    side, draws = built.resolution // built.downscale, torch.Generator().manual_seed(0)

    def pictures(count: int, caption: str, seed: int, prior: Pictures | None = None) -> Pictures:
        mean = torch.randn(count, built.latent_channels, side, side, generator=draws)
        return Pictures(built, mean, torch.full_like(mean, 0.1), [caption] * count, 1, prior, seed)

    of_class = pictures(PICTURES[1], PROMPTS[1], 0)
    jobs = [
        AdapterJob(str(n), functools.partial(pictures, PICTURES[0], PROMPTS[0], n, of_class), 1 << 30, n)
        for n in range(slots)
    ]
    if failed := [finished.failure for finished in many.fill(iter(jobs))]:
        raise RuntimeError(failed[0])

    def step() -> None:
        failed = many.step()
        if failed or any(slot.skipped for slot in many.slots):
            raise FloatingPointError(next(iter(failed.values()), "a step of an adapter was left out"))

    return step


# ---- measuring ------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one run, the mean of `times`; the device has finished at both ends."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(times):
        run()
    wait(device)
    return (time.perf_counter() - begun) / times


def shares(times: dict[str, float]) -> dict[str, float]:
    """Share of the time of each kind of kernels, of times by kernel."""
    found: dict[str, float] = defaultdict(float)
    for name, spent in times.items():
        fitting = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        found[next(fitting, "everything else")] += spent
    whole = sum(found.values())
    return {kind: round(found[kind] / whole, 4) for kind in sorted(KINDS)} if whole else {}


def profile(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """What a GPU, or a CPU, did in a step: milliseconds, their shares by kind, and the kernels that took longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as tracing

    gpu = device.type == "cuda"
    with tracing(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as traced:
        for _ in range(TRACED):
            step()
        wait(device)
    events = traced.key_averages()
    kind, field = (DeviceType.CUDA, "self_device_time_total") if gpu else (DeviceType.CPU, "self_cpu_time_total")
    own = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    times = {event.key: getattr(event, field) / 1e3 / TRACED for event in own if getattr(event, field) > 0}
    longest = sorted(times, key=lambda name: -times[name])[:LONGEST]
    return {
        "busy ms per step": round(sum(times.values()), 3), "shares": shares(times),
        "longest, ms per step": {name[:120]: round(times[name], 3) for name in longest},
        "CUDA graph launches per step": sum(e.count for e in events if e.key == "cudaGraphLaunch") / TRACED,
    }  # fmt: skip


def measure(way: str, slots: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of a way, in this process."""
    more: dict[str, Any] = {}
    encode = None
    if way == BANK:
        step = bank(options.base, slots, device)
    else:
        step, encode = stock(options.base, device, way == GRAPH)
    step()
    wait(device)
    first = time.time() - options.started
    for _ in range(options.warmup - 1):
        step()
    blocks = min(BLOCKS, options.steps)
    sizes = [options.steps // blocks + (i < options.steps % blocks) for i in range(blocks)]
    each = [seconds_of(step, size, device) for size in sizes]
    mean = sum(size * seconds for size, seconds in zip(sizes, each, strict=True)) / options.steps
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    else:
        peak = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if encode is not None:
        more["seconds to encode a step's pictures and captions"] = seconds_of(encode, 5, device)
        if way != GRAPH:
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counted:
                step()
            more["FLOP per step"] = counted.get_total_flops()
    try:
        more["profile"] = profile(step, device)
    except Exception as error:  # noqa: BLE001 - a profiler that does not run here leaves the times; it is written down
        more["profile"] = {"stopped": f"{type(error).__name__}: {str(error)[:300]}"}
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "slots": slots, "timed steps": options.steps, "seconds per step": mean, "seconds per step of blocks": each,
        "start-up seconds": first - mean, "peak GB": round(peak, 3), "peak GB reserved": round(reserved, 3), **more,
    }  # fmt: skip


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` gives, or that there was not enough memory for it."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        return {"stopped": f"out of memory: {str(error).partition('. ')[0]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("way", choices=(STOCK, EAGER, GRAPH, BANK))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--started", type=float, default=time.time(), help="when this process was, by time.time()")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(guarded(lambda: measure(options.way, options.slots, options, device))))


if __name__ == "__main__":
    main()
