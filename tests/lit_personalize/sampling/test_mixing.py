"""Between two prompts: exact ends, the mean half-way, the great circle, and what any stock pipeline draws from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.export.stock import comparison_scheduler, stock_pipeline
from lit_personalize.sampling.mixing import Mix, condition, slerp
from lit_personalize.sampling.sampler import SamplingOptions, generate, start_noise

A, B = "a photo of a cat", "a photo of a toy"


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_ends_are_exact_and_the_middle_lies_between(tiny_bases: dict[str, Path], family: str, spherical: bool) -> None:
    base = load_base(tiny_bases[family])
    with torch.no_grad():
        mixed = condition(base, [Mix(A, B, alpha, spherical) for alpha in (0.0, 0.5, 1.0)])
        first, second = base.condition([A] * 3), base.condition([B] * 3)
    assert mixed.time_ids is None or torch.equal(mixed.time_ids, first.time_ids)  # type: ignore[arg-type]
    for found, a, b in ((mixed.states, first.states, second.states), (mixed.pooled, first.pooled, second.pooled)):
        if found is None or a is None or b is None:
            assert family == "sd1"
            continue
        assert torch.equal(found[0], a[0]) and torch.equal(found[2], b[2])
        if not spherical:
            torch.testing.assert_close(found[1], (a[1] + b[1]) / 2)
        assert not torch.equal(a[0], b[0])


def test_the_sphere_keeps_norms_and_halves_the_angle() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(5, 16, generator=draws), dim=-1) for _ in range(2))
    angle = (a * b).sum(-1).acos()
    for alpha in (0.25, 0.5, 0.9):
        found = slerp(a, b, torch.tensor(alpha))
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close((found * a).sum(-1).acos(), alpha * angle, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor(0.5)), 1.5 * a)
    assert bool(slerp(a, -a, torch.tensor(0.5)).isfinite().all())


def test_a_plain_prompt_among_mixes_stays_itself(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    with torch.no_grad():
        found = condition(base, [A, Mix(A, B, 0.3)]).states
        assert torch.equal(found[0], base.condition([A, A]).states[0]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_stock_pipeline_draws_the_same_from_the_states(tiny_bases: dict[str, Path], family: str) -> None:
    base = load_base(tiny_bases[family])
    options = SamplingOptions(steps=2, guidance=3.0)
    ours = generate(base, [Mix(A, B, 0.4)], [5], None, options)[0]
    with torch.no_grad():
        told, nothing = condition(base, [Mix(A, B, 0.4)]), base.condition([""])
    pipe = stock_pipeline(base)
    pipe.scheduler = comparison_scheduler(pipe.scheduler)
    given = {"prompt_embeds": told.states, "negative_prompt_embeds": nothing.states}
    if told.pooled is not None:
        given |= {"pooled_prompt_embeds": told.pooled, "negative_pooled_prompt_embeds": nothing.pooled}  # type: ignore[dict-item]
    stock = pipe(
        **given, num_inference_steps=2, guidance_scale=3.0, height=base.resolution, width=base.resolution,
        latents=start_noise(base, [5]), output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(np.round(stock * 255) - ours.astype(float)).max() <= 1


def test_the_verb_draws_the_ends_as_they_are(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = ["sample", A, B, "--base", str(tiny_bases["sd1"]), "--steps", "1", "--device", "cpu", "-o"]
    assert main([*draw, str(tmp_path / "plain")]) == 0
    assert main([*draw, str(tmp_path / "mixed"), "--mix", "0", "0.5", "1"]) == 0
    first, middle, last = (tmp_path / "mixed" / f"{i:02d}_0.png" for i in range(3))
    assert first.read_bytes() == (tmp_path / "plain/00_0.png").read_bytes()
    assert last.read_bytes() == (tmp_path / "plain/01_0.png").read_bytes()
    assert middle.read_bytes() not in (first.read_bytes(), last.read_bytes())
    capsys.readouterr()
    assert main(["sample", "a third", *draw[1:], str(tmp_path / "three"), "--mix", "0.5"]) == 2
    assert main([*draw, str(tmp_path / "out"), "--mix", "1.5"]) == 2
    assert main([*draw, str(tmp_path / "out"), "--slerp"]) == 2
    told = capsys.readouterr().err
    assert "between two prompts, not 3" in told and "share in [0, 1]" in told and "give --mix" in told
    with pytest.raises(UsageError, match="share in"):
        Mix(A, B, -0.1)
