"""Ahead-of-time compiles for GPUs that need not be there: registers, spills, shared memory, occupancy.

Every operator lists the forms of its kernels that it launches (`shipped()`); each is compiled for sm_80 and sm_90 with
Triton's own compiler and read with the tools that Triton brings along. Nothing here needs a driver.

    litp profile compile [--only text_kv] [--arch 90] [--dtype fp16]
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

OPERATORS = ("text_kv", "short_key_attention", "bank_lora", "bank_adamw", "frozen_geglu", "absorbed_attention")
ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute capabilities)."""
SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024}
TENSOR_CORES = re.compile(r"\b(HGMMA|HMMA|QGMMA|DMMA)\b")
LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Shipped:
    """One form of a kernel that an operator launches.

    Args:
        config: What tells it from the operator's other forms, for people and as a key.
        signature: Triton type of every argument in order: `*bf16`, `i32`, `fp32`, or `constexpr`.
        constants: Values of the constexpr arguments.
        divisible: Arguments that are divisible by 16, as pointers and row lengths are at real sizes.
        dots: Whether the kernel multiplies matrices, which must then run on tensor cores.
    """

    kernel: Any
    config: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    divisible: tuple[str, ...] = ()
    dots: bool = True

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def of(self, dtype: str) -> Shipped:
        """The same form for tensors in "bf16" or "fp16"; forms are listed in bf16."""
        return replace(self, signature={name: kind.replace("bf16", dtype) for name, kind in self.signature.items()})


@dataclass
class Resources:
    """What one form takes on one architecture; per thread, except shared memory per program."""

    name: str
    arch: str
    config: str
    registers: int
    spills: int
    """Bytes of local memory per thread; above 0 the kernel is not shipped."""
    shared_bytes: int
    tensor_core_instructions: int
    warps_per_sm: int
    """Warps that fit on one multiprocessor at once, of 64."""
    faults: list[str] = field(default_factory=list)


def shipped(operators: Sequence[str] = OPERATORS) -> Iterator[Shipped]:
    """Every form of every kernel."""
    for operator in operators:
        for part in ("forward", "backward"):
            module = f"lit_kernels.{operator}.{part}"
            if importlib.util.find_spec(module) is not None:
                yield from importlib.import_module(module).shipped()


def compile_for(form: Shipped, arch: int) -> Resources:
    """Compile one form; 1 to 10 seconds. Results stay in Triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    names = list(form.signature)
    source = ASTSource(
        fn=JITFunction(form.kernel.fn),  # under the interpreter the decorator gives something else
        signature=form.signature,
        constexprs={(names.index(name),): value for name, value in form.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in form.divisible},
    )
    options = {"num_warps": form.warps, "num_stages": form.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage!r}")
    registers, stack = int(found[1]), int(found[2])
    shared = int(compiled.metadata.shared)
    made = Resources(
        name=form.name,
        arch=f"sm_{arch}",
        config=form.config,
        registers=registers,
        spills=stack,
        shared_bytes=shared,
        tensor_core_instructions=len(TENSOR_CORES.findall(sass)),
        warps_per_sm=_warps_per_sm(arch, form.warps, registers, shared),
    )
    made.faults = _faults(form, arch, made, bool(LOCAL_MEMORY.search(sass)))
    return made


def _faults(form: Shipped, arch: int, made: Resources, local: bool) -> list[str]:
    faults = []
    if made.spills or local:
        faults.append(f"spills {made.spills} bytes a thread")
    if made.shared_bytes > SHARED_LIMIT[arch]:
        faults.append(f"{made.shared_bytes} bytes of shared memory, {SHARED_LIMIT[arch]} are allowed")
    if form.dots and not made.tensor_core_instructions:
        faults.append("multiplies matrices without tensor cores")
    if made.warps_per_sm < 4:
        faults.append(f"only {made.warps_per_sm} warps fit on a multiprocessor")
    return faults


def _warps_per_sm(arch: int, warps: int, registers: int, shared: int) -> int:
    """Warps of all programs that fit: registers are given out per warp by 256, shared memory by 1 KiB more each."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED_OF_SM[arch] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps) * warps


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def compile_all(
    operators: Sequence[str] = OPERATORS,
    architectures: Sequence[int] = ARCHITECTURES,
    jobs: int = 1,
    dtype: str = "bf16",
) -> Iterator[Resources]:
    """Compile every form for every architecture, in `jobs` processes; results come in order."""
    forms = [(name, i) for name in operators for i in range(len(list(shipped([name]))))]
    tasks = [(name, i, arch, dtype) for name, i in forms for arch in architectures]
    # Processes of their own: where Triton interprets kernels, its own functions are no longer compilable.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_without_the_interpreter) as pool:
        yield from pool.map(_compile, tasks)


def _without_the_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "0"


def _compile(task: tuple[str, int, int, str]) -> Resources:
    operator, number, arch, dtype = task
    return compile_for(list(shipped([operator]))[number].of(dtype), arch)


def as_dict(made: Sequence[Resources]) -> dict[str, Any]:
    """What is stored and compared: the compiler and what each form takes."""
    return {"triton": version("triton"), "kernels": [asdict(one) for one in made]}


def results_name(dtype: str = "bf16") -> str:
    """Of the file in `kernels/benchmarks/results` for the compiler that is installed."""
    return f"compile-{'' if dtype == 'bf16' else f'{dtype}-'}triton-{version('triton')}.json"


HEADER = f"{'kernel':30} {'form':38} {'arch':6} registers  spills  shared  tensor-core  warps/SM"


def line_of(one: Resources) -> str:
    """A line of the table under `HEADER`."""
    return (
        f"{one.name:30} {one.config:38} {one.arch:6} {one.registers:9} {one.spills:7} {one.shared_bytes:7} "
        f"{one.tensor_core_instructions:12} {one.warps_per_sm:9}  {'; '.join(one.faults)}"
    ).rstrip()
