"""SDXL at real size, on the meta device: what each of eight ranks holds under FSDP2. No process talks to another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lit_personalize import sharding
from lit_personalize.adapters.full_weights import FullWeights
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.oft import OFT
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.planning_memory import StepMemory
from lit_personalize.planning_shares import per_device

RANKS = 8
WEIGHTS = 2_567_463_684
"""Of stable-diffusion-xl-base-1.0's UNet."""
KEY_VALUE = 2 * (2048 * 640 * 10 + 2048 * 1280 * 60)
"""Of its 70 cross-attention layers: 10 of width 640 and 60 of 1280, K and V, from text of 2048."""
UNET = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("data_parallel",))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def sdxl(tiny_bases: dict[str, Path], tmp_path: Path) -> Base:
    """A directory with SDXL's UNet as a config, and no weights anywhere."""
    import shutil

    folder = tmp_path / "sdxl"
    shutil.copytree(tiny_bases["sdxl"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **UNET}))
    return load_base(folder, dtype="bfloat16", weights=False)


def shares(base: Base, mesh: DeviceMesh, trained: bool) -> list[int]:
    """Bytes of each rank's share, from the parts that DTensor says it has."""
    sharding.shard(base, mesh)
    found = [p for p in base.unet.parameters() if p.requires_grad is trained]
    assert sharding.local_bytes(found) == sum(p.to_local().nbytes for p in found)  # type: ignore[operator]
    rows = [(p.shape[0], p[:1].numel() * p.element_size()) for p in found]
    chunks = [(-(-length // RANKS), length, size) for length, size in rows]
    return [sum(max(0, min(n, length - r * n)) * size for n, length, size in chunks) for r in range(RANKS)]


def test_all_weights_of_sdxl_are_shared_out_evenly(sdxl: Base, mesh: DeviceMesh) -> None:
    adapter = FullWeights()
    with torch.device("meta"):
        adapter.attach(sdxl)
    places = sharding.place(sdxl, [adapter])
    assert len(places) == len(adapter.factors) == 1680
    assert sum(p.numel() for p in adapter.factors.values()) == WEIGHTS
    planned = shares(sdxl, mesh, trained=True)
    assert sum(planned) == 4 * WEIGHTS
    own = sharding.local_bytes(adapter.factors.values())
    assert own == planned[0] and own == pytest.approx(4 * WEIGHTS / RANKS, rel=1e-4), "1.28 GB of changes"
    frozen = [p for p in sdxl.unet.parameters() if not p.requires_grad]
    assert sharding.local_bytes(frozen) == pytest.approx(2 * WEIGHTS / RANKS, rel=1e-4), "0.64 GB of the base in bf16"


def test_key_and_value_of_sdxl_are_shared_out_with_the_base(sdxl: Base, mesh: DeviceMesh) -> None:
    adapter = KeyValueDelta()
    with torch.device("meta"):
        adapter.attach(sdxl)
    sharding.place(sdxl, [adapter])
    assert sum(shares(sdxl, mesh, trained=True)) == 4 * KEY_VALUE
    assert sharding.local_bytes(adapter.factors.values()) == 4 * KEY_VALUE / RANKS
    optimizer = torch.optim.AdamW(adapter.parameter_groups())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in adapter.factors.values()}, "moments are of shares, too"


@pytest.mark.parametrize("adapter", [FullWeights, KeyValueDelta])
def test_litp_plan_says_what_the_first_rank_holds(sdxl: Base, mesh: DeviceMesh, adapter: type[Adapter]) -> None:
    objective = Denoising("unused", [adapter()])
    with torch.device("meta"):
        objective.attach_to(sdxl)
    objective.place_factors()
    trained = sum(p.nbytes for p in objective.trained[0].factors.values())
    frozen = {n: sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for n, m in sdxl.components().items()}
    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    planned = per_device(StepMemory(frozen, trained, optimizer=2 * trained), objective, strategy, RANKS)
    sharding.shard(sdxl, mesh)
    parts = [p for m in sdxl.components().values() for p in m.parameters()]
    buffers = sum(b.nbytes for m in sdxl.components().values() for b in m.buffers())
    own = sharding.local_bytes(p for p in parts if p.requires_grad)
    assert planned.resident["trained"] == planned.gradients == own > 0
    assert planned.resident["optimizer"] == pytest.approx(2 * own, abs=1)
    assert planned.resident["base"] == sharding.local_bytes(p for p in parts if not p.requires_grad) + buffers


def test_an_adapter_that_reads_whole_weights_is_refused(sdxl: Base) -> None:
    for adapter in (OFT(), LoRA(use_dora=True)):
        with pytest.raises(UsageError, match="needs whole weights of the base; train it with DDP"):
            sharding.place(sdxl, [adapter])
    assert sharding.place(sdxl, [LoRA()]) == {}
