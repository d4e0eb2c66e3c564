"""Values of a sweep, its tasks and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_personalize.errors import DataError, UsageError
from lit_personalize.sweeps import Sweep, indices, override_of, points_in, points_of, read, values_of

BASE = {"model": {"init_args": {"adapters": [{"class_path": "LoRA", "init_args": {"rank": 4}}], "seed": 0}}}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("rank=4,8,16", [4, 8, 16]),
        ("seed=0..3,7", [0, 1, 2, 3, 7]),
        ("lr=1e-4,0.5,2E3", [1e-4, 0.5, 2000.0]),
        ("token=<new1>,'a, b'", ["<new1>", "a, b"]),
        ("prompts=[a,b],[c]", [["a", "b"], ["c"]]),
        ("flag=true,null", [True, None]),
    ],
)
def test_values_are_read(text: str, values: list[Any]) -> None:
    assert values_of(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize(
    ("text", "said"),
    [("rank", "must be KEY=VALUE"), ("rank=", "there is no value"), ("a b=1", "must be KEY=VALUE"),
     ("rank=[1", "are no YAML"), ("seed=3..1", "is empty; write 1..3")],
)  # fmt: skip
def test_what_is_no_list_of_values(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        values_of(text)


def test_combinations_and_pairs(tmp_path: Path) -> None:
    axes = [("rank", [4, 8]), ("seed", [0, 1])]
    assert [tuple(p.values()) for p in points_of(axes, False)] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert points_of(axes, True) == [{"rank": 4, "seed": 0}, {"rank": 8, "seed": 1}]
    twice, own = [("a", [1]), ("a", [2])], [("name", ["x"])]
    for wrong, said in ((twice, "given twice"), (own, "sets it for each run"), ([], "give --over")):
        with pytest.raises(UsageError, match=said):
            points_of(wrong, False)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a has 1, b has 2"):
        points_of([("a", [1]), ("b", [1, 2])], True)
    (tmp_path / "grid.yaml").write_text("rank: [4, 8]\nlr: 1e-4\n")
    assert points_in(tmp_path / "grid.yaml", False) == [{"rank": 4, "lr": 1e-4}, {"rank": 8, "lr": 1e-4}]
    (tmp_path / "list.yaml").write_text("- {rank: 4, lr: 0.1}\n- {rank: 8}\n")
    found = points_in(tmp_path / "list.yaml", False, [("seed", [1, 2])])
    assert [tuple(point.values()) for point in found] == [(4, 0.1, 1), (4, 0.1, 2), (8, 1), (8, 2)]
    (tmp_path / "text.yaml").write_text("rank")
    with pytest.raises(UsageError, match="must map keys to lists"):
        points_in(tmp_path / "text.yaml", False)


def test_a_task_says_what_it_changes() -> None:
    point = {"model.init_args.adapters.0.init_args.rank": 8, "seed": 3}
    assert override_of(BASE, point, "s-003") == {
        "name": "s-003",
        "model": {"init_args": {"adapters": [{"class_path": "LoRA", "init_args": {"rank": 8}}], "seed": 3}},
        "data": {"init_args": {"seed": 3}},
    }
    assert BASE["model"]["init_args"]["adapters"][0]["init_args"]["rank"] == 4  # type: ignore[index]
    with pytest.raises(UsageError, match="adapters has 1 entries, counted from 0"):
        override_of(BASE, {"model.init_args.adapters.1.init_args.rank": 8}, "s-0")
    with pytest.raises(UsageError, match="model.init_args.seed is no list"):
        override_of(BASE, {"model.init_args.seed.0": 8}, "s-0")


def test_a_sweep_that_was_written_is_read_and_kept(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "s", points_of([("seed", [1, 2])], False))
    overrides = [override_of(BASE, point, sweep.run_name(task)) for task, point in enumerate(sweep.points)]
    sweep.write(yaml.safe_dump(BASE), overrides)
    assert read(tmp_path, "s") == sweep and sweep.pattern == "s-{task:03}"
    assert yaml.safe_load((sweep.path / "tasks/001.yaml").read_text())["name"] == "s-001"
    sweep.refuse_another(BASE)
    with pytest.raises(UsageError, match="2 tasks with other values"):
        Sweep(tmp_path, "s", [{"seed": 1}]).refuse_another(BASE)
    with pytest.raises(UsageError, match=r"another configuration \(model.init_args.seed differ\)"):
        sweep.refuse_another({"model": {"init_args": BASE["model"]["init_args"] | {"seed": 1}}})
    with pytest.raises(DataError, match="there is no sweep 't' in .*; sweeps: s"):
        read(tmp_path, "t")
    (sweep.path / "table.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(DataError, match="format 9"):
        read(tmp_path, "s")


def test_indices_of_an_array() -> None:
    assert indices([0, 2, 3, 4, 9]) == "0,2-4,9" and indices([7]) == "7"
