"""What files and options make together: lists are replaced, mappings merged, classes named by their path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_personalize.configuration import instantiate, parse, resolved_text
from lit_personalize.errors import UsageError
from lit_personalize.list_replacement import replace_lists
from lit_personalize.recipe_files import RECIPES, title_of

CATS = "[{path: cats, class_noun: cat, token: <new1>, repeats: 3}]"
FIRST = """\
name: run
model:
  init_args:
    adapters: [{class_path: LoRA, init_args: {rank: 7, alpha: 3}}]
data:
  init_args:
    concepts: CATS
    regularization: [{folder: cats, prompt: a cat, per_batch: 2}]
"""
SECOND = """\
model: {init_args: {adapters: [{class_path: LoRA, init_args: {alpha: 4}}], seed: 5}}
data: {init_args: {concepts: [{path: pots}], regularization: [{folder: pots}]}}
"""


@pytest.fixture
def first(tmp_path: Path) -> str:
    (tmp_path / "first.yaml").write_text(FIRST.replace("CATS", CATS))
    return str(tmp_path / "first.yaml")


def _concepts(*arguments: str) -> list[tuple[str, str, str | None, int]]:
    _, config = parse(["-c", "lora/tinyworld", *arguments])
    return [(c.path, c.class_noun, c.token, c.repeats) for c in config.data.init_args.concepts]


def test_a_later_file_replaces_lists_and_merges_mappings(first: str, tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text(SECOND)
    assert _concepts("-c", first) == [("cats", "cat", "<new1>", 3)]
    _, config = parse(["-c", "lora/tinyworld", "-c", first, "-c", str(tmp_path / "second.yaml")])
    (concept,) = config.data.init_args.concepts
    assert (concept.path, concept.class_noun, concept.token, concept.repeats) == ("pots", "", None, 1)
    (adapter,) = config.model.init_args.adapters
    assert adapter.init_args.alpha == 4 and adapter.init_args.rank != 7
    (reg,) = config.data.init_args.regularization
    assert (reg.folder, reg.per_batch) == ("pots", None) and "cat" not in reg.prompt
    assert config.name == "run" and config.model.init_args.seed == 5


@pytest.mark.parametrize("key", ["--data.init_args.concepts", "--data.concepts"])
@pytest.mark.parametrize("joined", [True, False])
def test_the_command_line_replaces_a_list(first: str, key: str, joined: bool) -> None:
    value = "[{path: pots}]"
    given = [f"{key}={value}"] if joined else [key, value]
    assert _concepts("-c", first, *given) == [("pots", "", None, 1)]
    assert _concepts("-c", first, *given, key, CATS) == [("cats", "cat", "<new1>", 3)]


def test_a_plus_still_appends(first: str) -> None:
    added = _concepts("-c", first, "--data.init_args.concepts+", "[{path: pots}]")
    assert added == [("cats", "cat", "<new1>", 3), ("pots", "", None, 1)]


def test_nothing_is_inserted_for_what_is_given_once(first: str) -> None:
    given = ["-c", first, "--sampling.prompts", "[a: b]", "--resume", "must", "--name", "a: b: c", "--ema=0.9"]
    assert replace_lists(given) == given
    again = replace_lists([*given, "--data", "{init_args: {concepts: [{path: pots}]}}"])
    assert again == [*given, "--data.init_args.concepts=[]", "--data", "{init_args: {concepts: [{path: pots}]}}"]


def test_options_win_over_files_wherever_they_stand(first: str) -> None:
    given = ["--name", "mine", "--data.init_args.concepts", "[{path: pots}]"]
    _, config = parse([*given, "-c", "lora/tinyworld", "-c", first])
    assert config.name == "mine"
    assert [c.path for c in config.data.init_args.concepts] == ["pots"]


@pytest.mark.parametrize(
    ("recipe", "given", "name", "decay"),
    [
        ("ziplora/tinyworld", [], "Adam", 0.0),
        ("cones/tinyworld", [], "SGD", 0.0),
        ("lora/tinyworld", [], "AdamW", 0.0001),
        ("lora/tinyworld", ["--model.init_args.optimizer", "{class_path: torch.optim.Adam, init_args: {lr: 1.0}}"],
         "Adam", 0.0),
        ("lora/tinyworld", ["--model.init_args.optimizer=torch.optim.SGD"], "SGD", 0.0),
        ("lora/tinyworld", ["--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.init_args.lr", "1.0"],
         "SGD", 0.0),
        ("lora/tinyworld", ["--model.init_args.optimizer.init_args.lr", "1.0"], "AdamW", 0.0001),
        ("lora/tinyworld", ["--model.optimizer", "{class_path: torch.optim.AdamW, init_args: {lr: 1.0}}"],
         "AdamW", 0.0001),
    ],
)  # fmt: skip
def test_an_optimizer_has_no_options_of_another_class(
    recipe: str, given: list[str], name: str, decay: float, first: str
) -> None:
    """Adam would take AdamW's default decay, and every merger of ZipLoRA would sink to nothing."""
    _, config = parse(["-c", recipe, "-c", first, *given])
    optimizer = config.model.init_args.optimizer
    assert optimizer.class_path == f"torch.optim.{name}" and optimizer.init_args.weight_decay == decay
    assert not given or name == "SGD" and len(given) == 1 or optimizer.init_args.lr == 1.0


@pytest.mark.parametrize("where", ["file", "command line"])
def test_a_scheduler_of_the_learning_rate_is_named_like_an_optimizer(where: str, first: str, tmp_path: Path) -> None:
    cosine = "{class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 300}}"
    (tmp_path / "more.yaml").write_text(f"name: run\nmodel: {{init_args: {{lr_scheduler: {cosine}}}}}\n")
    given = {"file": ["-c", str(tmp_path / "more.yaml")],
             "command line": ["--name", "run", "--model.init_args.lr_scheduler", cosine]}[where]  # fmt: skip
    objective = instantiate(*parse(["-c", "lora/tinyworld", "-c", first, *given])).model
    objective.configure_model()
    made = objective.configure_optimizers()["lr_scheduler"]
    assert isinstance(made["scheduler"], torch.optim.lr_scheduler.CosineAnnealingLR)
    assert made["scheduler"].T_max == 300 and made["interval"] == "step"


def test_the_recipe_is_a_name_that_changes_nothing(first: str, tmp_path: Path) -> None:
    def of(*arguments: str) -> str:
        return str(parse([*arguments, "-c", first])[1].recipe)

    assert of("-c", "lora/tinyworld", "-c", "hardware/8gb") == "lora"
    assert of("-c", "lora/tinyworld", "-c", "custom_diffusion/tinyworld") == "custom_diffusion", "the last one wins"
    assert of("-c", "lora/tinyworld", "--recipe", "ours") == "ours"
    (tmp_path / "run.yaml").write_text((RECIPES / "lora" / "tinyworld.yaml").read_text() + "recipe: pivotal_tuning\n")
    copy = str(tmp_path / "run.yaml")
    assert of("-c", copy) == "pivotal_tuning"
    (tmp_path / "run.yaml").write_text((RECIPES / "lora" / "tinyworld.yaml").read_text())
    assert of("-c", copy) == "", "a file that says nothing"
    texts = {resolved_text(*parse(["-c", where, "-c", first])) for where in ("lora/tinyworld", copy)}
    (text,) = texts
    assert "recipe" not in text, "or runs from before would not be finished"
    (tmp_path / "again.yaml").write_text(text)
    assert resolved_text(*parse(["-c", str(tmp_path / "again.yaml")])) == text


def test_a_method_is_called_as_its_recipe_calls_it() -> None:
    titles = {"custom_diffusion": "Custom Diffusion", "dreambooth_lora": "DreamBooth with LoRA", "b_lora": "B-LoRA"}
    assert {method: title_of(method) for method in titles} == titles
    assert [title_of(other) for other in ("ours", "", "..", "hardware")] == ["ours", "", "..", "hardware"]


def test_one_entry_of_a_list_is_changed_by_its_place(first: str) -> None:
    ranks = "--model.init_args.adapters.0.init_args"
    _, config = parse(["-c", "lora/tinyworld", "-c", first, f"{ranks}.rank=9", f"{ranks}.lr", "1e-4"])
    (adapter,) = config.model.init_args.adapters
    assert (adapter.init_args.rank, adapter.init_args.alpha, adapter.init_args.lr) == (9, 3, 1e-4)
    _, config = parse([f"{ranks}.rank=9", "-c", "lora/tinyworld", "-c", first, "--data.init_args.concepts.0.path=b"])
    assert config.data.init_args.concepts[0].path == "b" and config.data.init_args.concepts[0].class_noun == "cat"
    for wrong, said in (
        (f"{ranks}.rnk=9", "unknown key 'rnk'; did you mean 'rank'"),
        (f"{ranks}.rank=many", "rank.* must be int"),
        ("--model.init_args.adapters.1.init_args.rank=9", "adapters has 1 entries, counted from 0"),
        ("--trainer.max_steps.0=9", "trainer.max_steps is no list"),
        (f"{ranks}.rank", "needs a value"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(["-c", "lora/tinyworld", "-c", first, wrong])
