"""Coefficients as all that trains: the gradient, what is exported, a picture inverted end to end; delayed injection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_personalize.adapters.delayed import Delayed
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.subspace_lora import SubspaceLoRA
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch
from lit_personalize.cli.main import main
from lit_personalize.configuration import instantiate, parse
from lit_personalize.corpus.layout import Layout
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.loading import read_adapter
from lit_personalize.recipe_files import RECIPES
from lit_personalize.sampling.sampler import SamplingOptions, generate, generate_latents
from lit_personalize.tinyworld.identities import identity, shown_before
from lit_personalize.weights2weights.points import row_of
from lit_personalize.weights2weights.subspace import Subspace


def attached(planted: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Base, SubspaceLoRA]:
    base = load_base(planted.space.details["base"], dtype=dtype)
    adapter = SubspaceLoRA(str(planted.folder), **options)
    adapter.attach(base)
    return base, adapter


def prediction(base: Base, adapters: Any, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    z = torch.randn(1, 4, 8, 8, generator=draws).to(base.dtype)
    return base.predict(z, torch.tensor([500]), base.condition(["a photo of ktn"]), adapters=adapters)


def test_planted_coefficients_are_recovered(planted: Any) -> None:
    """The exact distance of factors, as PEFT's layers hold them, leads back to the adapter."""
    _, adapter = attached(planted)
    wanted = planted.space.coefficients[11]
    row = planted.space.unproject(wanted)
    beta = adapter.factor("beta")
    assert torch.equal(beta, torch.zeros(8)) and list(adapter.named_factors()) == ["beta"]
    optimizer = torch.optim.LBFGS([beta], max_iter=100, line_search_fn="strong_wolfe")
    targets = planted.space.layout.views(row / planted.space.deviation)
    scales = planted.space.layout.views(planted.space.deviation)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        adapter.refresh(torch.float32)
        loss = torch.zeros(())
        for layer, peft in adapter._peft.items():
            for part, linear in (("A", peft.lora_A[adapter.name]), ("B", peft.lora_B[adapter.name])):
                name = f"{layer}:{part}"
                loss = loss + (linear.weight / scales[name] - targets[name]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(beta.detach(), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_the_gradient_is_that_of_finite_differences(planted: Any) -> None:
    base, adapter = attached(planted, torch.float64)
    adapter.double()
    beta = adapter.factor("beta")
    with torch.no_grad():
        beta.copy_(planted.space.coefficients[2].double())

    def loss() -> torch.Tensor:
        adapter.refresh(torch.float64)
        return prediction(base, [adapter]).square().mean()

    loss().backward()
    for k, step in ((0, 1e-3), (3, 1e-3), (7, 1e-3)):
        ends = []
        for side in (step, -step):
            with torch.no_grad():
                beta[k] += side
                ends.append(float(loss()))
                beta[k] -= side
        assert float(beta.grad[k]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_the_export_does_what_the_adapter_does(planted: Any) -> None:
    base, adapter = attached(planted, components=5, start="critter-04")
    assert torch.equal(adapter.factor("beta").detach(), planted.space.coefficients[4, :5])
    weights = adapter.export_weights()
    for layer in adapter.layers():
        own = adapter.delta(layer).detach()
        assert float((weights.delta(layer) - own).norm() / own.norm()) < 1e-6, layer
    with torch.no_grad():
        found = prediction(base, [adapter])
        plain = prediction(base, ())
    other = load_base(planted.space.details["base"])
    loaded = LoadedAdapter(weights)
    loaded.attach(other)
    assert torch.allclose(found, prediction(other, [loaded]).detach(), atol=1e-5)
    assert float((found - plain).abs().max()) > 1e-3, "alpha / rank counts"


def test_what_does_not_fit_is_refused(planted: Any, tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="has 8 components, and 9 are asked for"):
        attached(planted, components=9)
    with pytest.raises(DataError, match="no adapter 'nobody' to start at"):
        attached(planted, start="nobody")
    with pytest.raises(DataError, match="adapters of base"):
        SubspaceLoRA(str(planted.folder)).attach(load_base(tiny_bases["sd2"]))


@pytest.mark.parametrize("base", ["sd15", "tinyworld"])
def test_recipes_keep_the_paper_s_numbers(base: str) -> None:
    given = ["-c", f"weights2weights_inversion/{base}", "--name", "x", "--data.init_args.concepts", '[{"path": "x"}]']
    parser, config = parse(given)
    options = config.model.init_args
    assert vars(options.optimizer.init_args)["lr"] == 0.1 and options.optimizer.init_args.weight_decay == 1e-10
    assert options.optimizer.class_path == "torch.optim.Adam" and config.trainer.max_steps == 400
    assert (RECIPES / "weights2weights_inversion" / f"{base}.yaml").is_file()


def test_a_picture_is_inverted(span: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded base: fewer than all components train, the loss at fixed draws falls, files are whole."""
    base, adapter = load_base("tinyworld"), LoRA(rank=1, alpha=27, targets="query_value", init="kaiming", init_seed=0)
    adapter.attach(base)
    layout = Layout.of(adapter.export_weights())
    begun = layout.flatten(adapter.export_weights())
    rows = begun + 0.01 * torch.randn(9, layout.width, generator=torch.Generator().manual_seed(0))
    space = span(rows, layout, [str(n) for n in range(9)], 8, base="tinyworld", base_fingerprint=base.fingerprint)
    space.save(tmp_path / "space")
    picture = tmp_path / "critter.png"
    Image.fromarray(next(shown_before(identity(3), ["white"]))).save(picture)
    given = ["w2w", "invert", str(tmp_path / "space"), str(picture), "--prompt", "photo of a sks critter"]
    more = ["--components", "6", "--steps", "25", "--lr", "1", "--root", str(tmp_path / "runs"), "--name", "one"]
    capsys.readouterr()
    assert main([*given, *more, "--sampling.steps", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    run = tmp_path / "runs" / "one"
    beta = torch.tensor(json.loads((run / "exports" / "w2w.json").read_text())["coefficients"])
    assert report["step"] == 25 and beta.shape == (6,) and float(beta.abs().min()) > 0
    base = load_base("tinyworld")
    row = row_of(space.layout, read_adapter(run / "exports", base), "found")
    assert torch.allclose(row, space.unproject(beta), atol=1e-5 * float(row.abs().max()))
    assert json.loads((run / "exports" / "verify.json").read_text())["files"][0]["largest_error"] < 1e-6

    built = instantiate(*parse(["-c", str(run / "config.yaml")]))
    objective, data = built.model, built.data
    objective.configure_model()
    data.bind(objective.built, objective.built, None, "")
    data.prepare_data()
    data.setup("fit")
    batch = Batch.of(next(iter(data.train_dataloader())))
    (adapter,) = objective.trained
    losses = []
    for values in (torch.zeros(6), beta):
        adapter.restore({"beta": values})
        adapter.refresh(torch.float32)
        with torch.no_grad():
            losses.append(sum(float(objective.loss(batch, 1000 + draw).reduce()) for draw in range(48)) / 48)
    assert losses[1] < losses[0], losses


def test_masks_are_one_for_each_picture(planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    given = ["w2w", "invert", str(planted.folder), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--prompt", "x"]
    assert main([*given, "--mask", str(tmp_path / "a.png"), "--root", str(tmp_path)]) == 2
    assert "2 pictures and 1 masks" in capsys.readouterr().err
    assert main([*given[:3], str(tmp_path / "c.png"), *given[3:], "--root", str(tmp_path)]) == 3
    assert "c.png does not exist" in capsys.readouterr().err


# ---- delayed injection ---------------------------------------------------------------------------


def test_an_edit_is_applied_from_its_timestep_on(planted: Any) -> None:
    """Below all timesteps T gives the original's latents, above all the edit's; between, the edit from T on."""
    space: Subspace = planted.space
    pair = [space.weights_of(space.coefficients[number]) for number in (0, 1)]
    options = SamplingOptions(steps=4, guidance=1.0)

    def latents(adapter: LoadedAdapter) -> torch.Tensor:
        base = load_base(space.details["base"])
        adapter.attach(base)
        return generate_latents(base, ["a cat"], [0], [adapter], options)

    original, edited = (latents(LoadedAdapter(weights)) for weights in pair)
    assert torch.equal(latents(Delayed(*pair, timestep=-1)), original)
    assert torch.equal(latents(Delayed(*pair, timestep=1000)), edited)
    asked: list[tuple[float, bool]] = []

    class Noting(Delayed):
        def at(self, progress: float, timestep: float = 0.0) -> None:
            super().at(progress, timestep)
            asked.append((timestep, self.weights is self.stages[1]))

    between = latents(Noting(*pair, timestep=500))
    assert len(asked) == 5 and all(edits == (t <= 500) for t, edits in asked)
    assert {edits for _, edits in asked} == {True, False}
    assert not torch.equal(between, original) and not torch.equal(between, edited)
    with pytest.raises(UsageError, match="different layers"):
        fewer = space.weights_of(space.coefficients[0])
        fewer.low_rank.pop(fewer.layers()[0])
        Delayed(pair[0], fewer, 500)


def test_the_verb_samples_with_a_delay(planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("critter-00", "critter-01"):
        merge = ["w2w", "merge", str(planted.folder), name, "-o", str(tmp_path / name), "--verify", "none"]
        assert main(merge) == 0
    given = ["sample", "a cat", "--base", planted.space.details["base"], "--steps", "4", "--guidance", "1"]
    pair = [str(tmp_path / "critter-00"), str(tmp_path / "critter-01")]
    assert main([*given, "--delayed", *pair, "500", "-o", str(tmp_path / "out")]) == 0
    base = load_base(planted.space.details["base"])
    adapter = Delayed(*(read_adapter(Path(place), base) for place in pair), timestep=500)
    adapter.attach(base)
    wanted = generate(base, ["a cat"], [0], [adapter], SamplingOptions(4, 1.0))[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "00_0.png")), wanted)
    assert main([*given, "--delayed", *pair, "soon", "-o", str(tmp_path / "out")]) == 2
    assert "'soon' is no timestep" in capsys.readouterr().err
