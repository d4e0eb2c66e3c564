"""The device of a verb: chosen in one place, refused where it is not there, and the same pictures on each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.configuration import instantiate, parse
from lit_personalize.devices import default_device, device_of
from lit_personalize.errors import UsageError
from lit_personalize.fitting import training_device
from lit_personalize.sampling.sampler import SamplingOptions, generate


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_everything_is_on_the_cpu(without_gpu: None) -> None:
    assert default_device() == device_of("auto") == device_of("cpu") == torch.device("cpu")
    for option in ("cuda", "gpu"):
        with pytest.raises(UsageError, match="sees no GPU"):
            device_of(option)


def test_every_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert device_of("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert device_of("cuda") == device_of("gpu") == torch.device("cuda", 0)
    assert device_of("cpu") == torch.device("cpu")


def test_a_training_is_prepared_where_the_trainer_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given = ["-c", "lora/tinyworld", "--name", "run", "--data.init_args.concepts", "[{path: photos}]"]
    for accelerator, kind in (("auto", "cuda"), ("gpu", "cuda"), ("cpu", "cpu")):
        parser, config = parse([*given, "--trainer.accelerator", accelerator])
        assert training_device(instantiate(parser, config)).type == kind


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "a cat"],
        ["verify", "{file}"],
        ["evaluate", "--adapter", "{file}", "--suite", "tinyworld", "--subject", "star-00", "--clip", "{file}"],
    ],
)
def test_a_gpu_that_is_not_there_is_one_message(
    without_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    subject = _any_subject()
    given = [a.format(file=tmp_path / "a.safetensors").replace("star-00", subject) for a in arguments]
    assert main([*given, "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _any_subject() -> str:
    from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS

    return sorted(HELD_OUT_CONCEPTS)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_pictures_on_a_gpu_are_those_of_the_cpu(tiny_bases: dict[str, Path]) -> None:
    """With a file's low-rank change and its token, whose tensors stay on the CPU."""
    drawn = []
    for device in ("cpu", "cuda"):
        base = load_base(tiny_bases["sd1"], device=device)
        layer = next(f"unet.{p}" for p, m in base.unet.named_modules() if p.endswith("attn2.to_k"))
        shape = base.unet.get_submodule(layer.removeprefix("unet.")).weight.shape
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(2, shape[1], generator=generator)
        up = torch.randn(shape[0], 2, generator=generator)
        row = torch.randn(1, base.added_rows[0].width, generator=generator)
        adapter = LoadedAdapter(AdapterWeights({layer: LowRank(down, up, 2.0)}, tokens={"<new1>": [row]}))
        adapter.attach(base)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pixels = generate(base, ["a <new1> cat"], [0], [adapter], SamplingOptions(steps=2))
            latents, _ = base.encode_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        drawn.append((pixels.astype(np.int16), latents.cpu()))
    (pixels, latents), (pixels_gpu, latents_gpu) = drawn
    assert np.abs(pixels - pixels_gpu).max() <= 2
    assert torch.allclose(latents, latents_gpu, atol=0.05)
