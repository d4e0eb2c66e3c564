"""New identities, directions, edits and merges: on planted factors, and as files that the stock client loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter
from lit_personalize.weights2weights.directions import METHODS, coded, find, without
from lit_personalize.weights2weights.points import row_of
from lit_personalize.weights2weights.sampling import draw
from lit_personalize.weights2weights.subspace import Subspace


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["w2w", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def back(planted: Any, folder: str | Path) -> Tensor:
    """The row of written files."""
    return row_of(planted.space.layout, read_adapter(Path(folder), planted.base), str(folder))


def close(found: Tensor, wanted: Tensor) -> bool:
    """To rounding: alpha is multiplied into B in the files, and taken out again."""
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


# ---- sampling ------------------------------------------------------------------------------------


def test_identities_have_the_corpus_s_distribution(planted: Any) -> None:
    space = planted.space
    drawn = draw(space, 2000, seed=3, spread=0.5, components=4)
    own = space.coefficients[:, :4]
    assert drawn.shape == (2000, 4)
    assert torch.allclose(drawn.std(0), 0.5 * own.std(0), rtol=0.06)
    assert bool(((drawn.mean(0) - own.mean(0)).abs() < 0.06 * own.std(0)).all())
    off = torch.corrcoef(drawn.T) - torch.eye(4)
    assert float(off.abs().max()) < 0.08, "components are independent"
    assert torch.equal(draw(space, 1, 3, 0.5, 4)[0], drawn[0]), "whatever is drawn beside it"
    assert not torch.equal(draw(space, 1, 4, 0.5, 4)[0], drawn[0])
    assert torch.equal(draw(space, 1, 3, 0.0, 4)[0], own.double().mean(0).float())


def test_identities_are_files_that_the_stock_client_loads(
    planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--formats", "diffusers", "kohya", "--verify", "first"]
    told = run(capsys, "sample", planted.folder, "--count", 2, "--seed", 5, "-o", tmp_path, *more)
    assert told["adapters"][0]["verified"] < 1e-6
    assert [Path(a["folder"]).name for a in told["adapters"]] == ["5-0000", "5-0001"]
    for number, record in enumerate(told["adapters"]):
        assert len(record["files"]) == 2
        wanted = draw(planted.space, 2, 5)[number]
        kept = json.loads(Path(record["folder"], "w2w.json").read_text())["coefficients"]
        assert torch.equal(torch.tensor(kept), wanted)
        assert close(back(planted, record["folder"]), planted.space.unproject(wanted))


# ---- directions ----------------------------------------------------------------------------------


def many(count: int = 800, factors: int = 6) -> tuple[Tensor, Tensor]:
    """Coefficients far from 0, and factors that they are a rotation of."""
    draws = torch.Generator().manual_seed(1)
    z = torch.randn(count, factors, generator=draws)
    rotation = torch.linalg.qr(torch.randn(factors, factors, generator=draws)).Q
    return z @ rotation + 7, rotation


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found(method: Any) -> None:
    beta, rotation = many()
    labels = (((beta - 7) @ rotation[1]) > 1.0).float()  # 16 % yes
    found = find(beta, labels, "hat", method)
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert float(found.vector @ rotation[1]) > 0.98
    assert found.deviation == pytest.approx(float((beta @ found.vector).std()), rel=1e-4)
    assert found.held_out > 0.9 and found.counts == (int((labels == 0).sum()), int(labels.sum()))
    signs = find(beta, 2 * labels - 1, "hat", method)
    assert torch.allclose(found.vector, signs.vector, atol=1e-5), "0/1 and ±1 mean the same: there is an intercept"
    some = labels.clone()
    some[::4] = float("nan")
    fewer = find(beta, some, "hat", method)
    assert sum(fewer.counts) == 600 and float(fewer.vector @ rotation[1]) > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_accuracy_is_of_adapters_that_the_fit_did_not_see(method: Any) -> None:
    beta, _ = many(80, 40)
    labels = (torch.rand(80, generator=torch.Generator().manual_seed(2)) > 0.7).float()
    found = find(beta, labels, "noise", method, components=40)
    assert 0.3 < found.held_out < 0.7, "forty numbers fit eighty random labels, and say nothing of others"


def test_numbers_have_directions_too() -> None:
    beta, rotation = many()
    found = find(beta, (beta - 7) @ rotation[2] + 20, "age")
    assert not found.classes and found.method == "least-squares"
    assert float(found.vector @ rotation[2]) > 0.999 and found.held_out > 0.999


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 2, 1, 2], "code yes and no as 1 and 0"),
        ([-1, 0, 1, 1], "leave unknown ones empty"),
        ([1, 1, 1], "all 3"),
        ([], "no adapter"),
    ],
)
def test_labels_of_unclear_coding_are_refused(values: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        coded(torch.tensor(values).double(), "hat")


def test_directions_are_freed_of_others() -> None:
    beta, rotation = many()
    z = (beta - 7) @ rotation.T
    mixed = ([1.0, 0.8, 0.5], [0.2, 1.0, 0.0], [0.0, 0.8, 1.0])
    labels = [(z @ torch.tensor(w + [0.0] * 3) > 0).float() for w in mixed]
    n, first, second = (find(beta, values, name) for values, name in zip(labels, "nab", strict=True))
    paper = without(n, [first, second], beta)
    whole = without(n, [first, second], beta, "orthogonal")
    for direction in (paper, whole):
        assert float(direction.vector.norm()) == pytest.approx(1, abs=1e-6) and direction.removed == ("a", "b")
        assert abs(float(direction.vector @ second.vector)) < 1e-6
        assert direction.deviation == pytest.approx(float((beta @ direction.vector).std()), rel=1e-4)
    assert abs(float(whole.vector @ first.vector)) < 1e-6 < 1e-2 < abs(float(paper.vector @ first.vector))
    with pytest.raises(DataError, match="nothing is left"):
        without(n, [n], beta)


# ---- edits ---------------------------------------------------------------------------------------


def test_an_edit_adds_its_direction_and_nothing_else(
    planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an adapter outside of the space: by α deviations along n, and the rest to the bit of rounding."""
    space: Subspace = planted.space
    outside = planted.rows[4] + 0.02 * torch.randn(planted.rows.shape[1], generator=torch.Generator().manual_seed(9))
    export(space.layout.unflatten(outside), tmp_path / "given", planted.base, "given", ["kohya"])
    edit = ["edit", planted.folder, tmp_path / "given", "--corpus", planted.corpus, "--along", "beard"]
    told = run(capsys, *edit, "--by", 2, -1.5, "--verify", "first", "-o", tmp_path / "out")
    assert [Path(a["folder"]).name for a in told["adapters"]] == ["by_2", "by_-1.5"]
    direction = find(space.coefficients, (planted.factors[:, 0] > 0).float(), "beard")
    assert told["adapters"][0]["held_out"] == pytest.approx(direction.held_out) and direction.held_out > 0.85
    assert 0.3 < told["adapters"][0]["residual"] < 1
    for record in told["adapters"]:
        change = back(planted, record["folder"]) - outside
        assert close(change / space.deviation, direction.step(space, record["by"]) / space.deviation)
        moved = space.project(outside + change) - space.project(outside)
        sigma = float((space.coefficients @ direction.vector).std())
        assert float(moved @ direction.vector) == pytest.approx(record["by"] * sigma, rel=1e-3)
    assert told["adapters"][0]["verified"] < 1e-6
    run(capsys, *edit, "--by", 0, "--project", "--verify", "none", "-o", tmp_path / "projected")
    assert close(back(planted, tmp_path / "projected"), space.unproject(space.project(outside)))


def test_an_id_is_whole_with_its_corpus_and_projected_without(
    planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["merge", planted.folder, "critter-07"]
    run(capsys, *given, "--verify", "none", "--corpus", planted.corpus, "-o", tmp_path / "whole")
    run(capsys, *given, "--verify", "none", "-o", tmp_path / "projected")
    assert close(back(planted, tmp_path / "whole"), planted.rows[7])
    assert close(back(planted, tmp_path / "projected"), planted.space.unproject(planted.space.coefficients[7]))


def test_files_of_another_start_are_refused(planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = planted.space.layout.unflatten(planted.rows[0])
    export(weights, tmp_path / "given", planted.base, "given", ["diffusers"], {"init_seed": 8})
    assert main(["w2w", "merge", str(planted.folder), str(tmp_path / "given"), "-o", str(tmp_path / "out")]) == 3
    assert "began from initial seed 8, the corpus from 0" in capsys.readouterr().err


# ---- merges --------------------------------------------------------------------------------------


def test_merges_are_linear_in_coefficients(planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = planted.space
    given = ["merge", planted.folder, "critter-01", "critter-02"]
    run(capsys, *given, "--at", 0, 0.25, "-o", tmp_path / "out", "--verify", "none")
    one, two = space.coefficients[1], space.coefficients[2]
    assert close(back(planted, tmp_path / "out/at_0"), space.unproject(one))
    assert close(back(planted, tmp_path / "out/at_0.25"), space.unproject(0.75 * one + 0.25 * two))
    run(capsys, *given, "--weights", 0.9, 0.6, "--verify", "none", "-o", tmp_path / "sum")
    assert close(back(planted, tmp_path / "sum"), space.unproject(0.9 * one + 0.6 * two))


def test_a_lora_from_elsewhere_stands_beside(planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = planted.space
    foreign = space.layout.unflatten(torch.randn(space.layout.width, generator=torch.Generator().manual_seed(4)))
    kept = list(foreign.low_rank)[:3]
    style = AdapterWeights(low_rank={layer: foreign.low_rank[layer] for layer in kept})
    export(style, tmp_path / "style", planted.base, "style", ["diffusers"])
    run(capsys, "merge", planted.folder, "critter-03", "--add", f"{tmp_path / 'style'}@0.5", "-o", tmp_path / "out")
    found = read_adapter(tmp_path / "out", planted.base)
    own = space.weights_of(space.coefficients[3])
    for layer in space.layout.layers:
        wanted = own.delta(layer) + (0.5 * style.delta(layer) if layer in kept else 0)
        assert torch.allclose(found.delta(layer), wanted, atol=1e-5), layer
        assert found.low_rank[layer].rank == 1 + (layer in kept)


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["edit", "SPACE", "critter-00", "--along", "beard"], 2, "name the corpus that has them with --corpus"),
        (["edit", "SPACE", "critter-00", "--along", "bread", "--corpus", "CORPUS"], 2, "did you mean beard?"),
        (["edit", "SPACE", "critter-000", "--along", "beard", "--corpus", "CORPUS"], 3, "did you mean critter-00?"),
        (
            ["edit", "SPACE", "mean", "--along", "beard", "--corpus", "CORPUS", "--components", "99"],
            2,
            "there are 8 components",
        ),
        (["sample", "SPACE", "--components", "9"], 2, "the space has 8 components"),
        (["sample", "CORPUS"], 3, "litp w2w fit"),
        (["merge", "SPACE", "critter-00", "--weights", "1", "2"], 2, "1 adapters and 2 weights"),
        (["merge", "SPACE", "critter-00", "--at", "1"], 2, "name two, not 1"),
        (["sample", "SPACE", "--base", "tinyworld"], 3, "the space is of adapters of base"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_sentence(
    planted: Any, tmp_path: Path, given: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"SPACE": str(planted.folder), "CORPUS": str(planted.corpus)}.get(part, part) for part in given]
    capsys.readouterr()
    assert main(["w2w", *given, "-o", str(tmp_path / "out")]) == code
    messages = [m for m in capsys.readouterr().err.splitlines() if m.startswith("litp w2w: ")]
    assert len(messages) == 1 and re.search(said, messages[0])
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom lit_personalize.cli.main import main\n"
        "for verb in ('sample', 'edit', 'invert', 'merge', 'explore'):\n"
        "    try: main(['w2w', verb, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: litp w2w") == 5


def test_an_output_of_another_kind_is_left_alone(planted: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["w2w", "sample", str(planted.folder), "-o", str(tmp_path)]) == 0, "each has a folder of its own"
    assert main(["w2w", "merge", str(planted.folder), "mean", "-o", str(tmp_path)]) == 2
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_spread_without_bounds_is_refused(planted: Any) -> None:
    with pytest.raises(UsageError, match="spread"):
        draw(planted.space, 1, spread=-1)
