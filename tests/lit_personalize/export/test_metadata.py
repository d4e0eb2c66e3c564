"""What every written file says about itself, and that writing is all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from lit_personalize import atomic
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.verify import verify

Train = Callable[[Path, list[Adapter]], tuple[Base, AdapterWeights]]


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as stream:
        return dict(stream.metadata())


@pytest.mark.parametrize(
    ("family", "architecture", "prediction"),
    [("sd1", "stable-diffusion-v1", "epsilon"), ("sd2", "stable-diffusion-v2-512", "epsilon"),
     ("sd2-v", "stable-diffusion-v2-768-v", "v"), ("sdxl", "stable-diffusion-xl-v1-base", "epsilon")],
)  # fmt: skip
def test_every_file_names_version_base_and_architecture(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path, family: str,
    architecture: str, prediction: str,
) -> None:  # fmt: skip
    base, weights = train(tiny_bases[family], everything)
    details = {"steps": 7, "config_sha256": "abc"}
    kinds = {"diffusers": "lora", "kohya": "lora", "peft": "lora", "delta": "delta", "embedding": "textual-inversion"}
    for item in export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft", "delta"], details):
        found = _metadata(item.path / "adapter_model.safetensors" if item.kind == "peft" else item.path)
        assert found["format"] == "pt" and found["litp.format_version"] == "1"
        assert found["litp.base_fingerprint"] == base.fingerprint and found["litp.base"] == family
        assert found["modelspec.architecture"] == f"{architecture}/{kinds[item.kind]}"
        assert found["modelspec.prediction_type"] == prediction and found["modelspec.trigger_phrase"] == "<new1>"
        assert json.loads(found["litp.details"]) == details and found["ss_steps"] == "7"
        assert str(tiny_bases[family]) not in json.dumps(found)


def test_declared_errors_are_written_and_zero_is_exact(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sd1"], [KeyValueDelta()])
    (rough,) = export(weights, tmp_path / "rough", base, "run", ["diffusers"], max_error=0.2)
    assert float(_metadata(rough.path)["litp.largest_error"]) == max(rough.errors.values()) > 1e-2
    (report,) = verify([rough], base, weights).files
    assert 1e-2 < report.largest_error <= 0.2
    (exact,) = export(weights, tmp_path / "exact", base, "run", ["diffusers"], max_error=0.0)
    (report,) = verify([exact], base, weights).files
    assert report.largest_error < 2e-6 and sum(report.ranks.values()) == len(weights.dense)
    with pytest.raises(UsageError, match="max_error"):
        export(weights, tmp_path, base, "run", max_error=-1)


def test_a_full_disk_leaves_the_earlier_export(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2)])
    (item,) = export(weights, tmp_path, base, "run", ["diffusers"])
    before = item.path.read_bytes()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        export(weights, tmp_path, base, "other", ["diffusers"])
    assert item.path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [item.path.name]
