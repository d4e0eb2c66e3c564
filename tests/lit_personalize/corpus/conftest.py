"""A tiny base, and finished adapters of it as `litp bank run` leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.export.exporter import export


@pytest.fixture(scope="session")
def base(tiny_bases: dict[str, Path]) -> Base:
    return load_base(tiny_bases["sd1"])


@pytest.fixture(scope="session")
def make_weights(tiny_bases: dict[str, Path]) -> Callable[..., AdapterWeights]:
    """A LoRA on q and v of all attention whose A began from `init_seed`, with a drawn B."""

    begun: dict[str, AdapterWeights] = {}

    def make(seed: int, init_seed: int = 0, **options: object) -> AdapterWeights:
        key = json.dumps([init_seed, options])
        if key not in begun:
            adapter = LoRA(**{"rank": 1, "targets": "query_value", **options})  # type: ignore[arg-type]
            adapter.attach(load_base(tiny_bases["sd1"]), init_seed)
            begun[key] = adapter.export_weights()
        weights, draws = deepcopy(begun[key]), torch.Generator().manual_seed(seed)
        for factors in weights.low_rank.values():
            factors.down += 1e-3 * torch.randn(factors.down.shape, generator=draws)
            factors.up = 1e-4 * torch.randn(factors.up.shape, generator=draws)
        return weights

    return make


@pytest.fixture
def finish(base: Base, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter into `out/exports/<id>` with its record."""

    def write(name: str, weights: AdapterWeights, **record: object) -> Path:
        folder = tmp_path / "out" / "exports" / name
        noted = {"seed": 7, "init_seed": 0, "steps": 3, "recipe": "lora/tinyworld", **record}
        export(weights, folder, base, name, ["diffusers"], noted)
        told = {"id": name, **noted, "loss": 0.25, "base_fingerprint": base.fingerprint, "files": [], **record}
        (folder / "adapter.json").write_text(json.dumps(told))
        return tmp_path / "out"

    return write
