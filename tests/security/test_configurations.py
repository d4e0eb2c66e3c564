"""Configurations of strangers: no tag, no class and no command of theirs is run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest

from lit_personalize.class_paths import ALLOWED, take_allowed
from lit_personalize.configuration import ADAPTERS, OBJECTIVES, data_classes, parse
from lit_personalize.errors import UsageError

Refused = Callable[..., str]
NOT_LISTED = "is not among the classes that a configuration may name"
TAG = "!!python/object/apply:builtins.open [RAN, w]"


@pytest.fixture(autouse=True)
def evil(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that can be imported, and that runs its payload when it is."""
    (workplace / "evil.py").write_text(hostile.EVIL_MODULE)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delitem(sys.modules, "evil", raising=False)


def given(text: str) -> list[str]:
    Path("theirs.yaml").write_text(text)
    return ["fit", "-c", "lora/tinyworld", "-c", "theirs.yaml", "--name", "x"]


@pytest.mark.parametrize("where", ["trainer", "slurm"])
def test_a_python_tag_in_yaml(refused: Refused, where: str) -> None:
    arguments = given(f"{where}: {TAG}\n")
    refused(arguments, 2, "theirs.yaml is not YAML: line 1: could not determine a constructor for the tag")
    refused(["slurm", "render", *arguments[1:]], 2, "theirs.yaml is not YAML: line 1")


def test_a_python_tag_in_a_file_that_yaml_names(refused: Refused) -> None:
    Path("other.yaml").write_text(f"class_path: {TAG}\n")
    refused(given("model: other.yaml\n"), 2, "other.yaml", "could not determine a constructor for the tag")


@pytest.mark.parametrize(("text", "part"), [
    (hostile.ALIASES, "more than 100000 values once its aliases"),
    ("a: &a [*a]\n", "more than 100000 values once its aliases"),
    ("a: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
])  # fmt: skip
def test_yaml_that_multiplies(refused: Refused, text: str, part: str) -> None:
    refused(given(text), 2, "theirs.yaml", part)


CLASS_PATHS = {
    "an optimizer": "model: {init_args: {optimizer: {class_path: CLASS}}}",
    "an optimizer by its name alone": "model: {init_args: {optimizer: CLASS}}",
    "a scheduler": "model: {init_args: {lr_scheduler: {class_path: CLASS, init_args: {a: 1}}}}",
    "a callback": "trainer: {callbacks: [{class_path: CLASS}]}",
    "an option of a callback": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: CLASS}}]}",
    "a logger": "trainer: {logger: {class_path: CLASS}}",
    "a strategy": "trainer: {strategy: {class_path: CLASS}}",
    "a plugin": "trainer: {plugins: [{class_path: CLASS}]}",
    "a profiler": "trainer: {profiler: {class_path: CLASS}}",
    "the objective": "model: {class_path: CLASS}",
    "an adapter": "model: {init_args: {adapters: [{class_path: CLASS}]}}",
    "the data": "data: {class_path: CLASS}",
}


@pytest.mark.parametrize("where", CLASS_PATHS)
def test_a_class_path_outside_the_list(where: str) -> None:
    """Whose module would run its payload on import, at every place where a class may stand."""
    with pytest.raises(UsageError, match=f"evil.Evil {NOT_LISTED}.* --allow evil or"):
        parse(given(CLASS_PATHS[where].replace("CLASS", "evil.Evil"))[1:])


@pytest.mark.parametrize("name", [
    "os.system", "subprocess.Popen", "builtins.exec", "torch.load", "torch.hub.load", "pickle.load", "runpy.run_path",
    "torch.optim.sgd.torch.load", "torch.optim.lr_scheduler.partial", "lightning.pytorch.callbacks.timer.re.compile",
    "lit_personalize.run_directory.subprocess.run", "webdataset.WebDataset", "jsonargparse.set_parsing_settings",
    "lit_personalize_evil.X", "__main__.X",
])  # fmt: skip
def test_code_that_lies_about(name: str) -> None:
    """Also where a module that is allowed has imported it."""
    with pytest.raises(UsageError, match=NOT_LISTED):
        parse(given(CLASS_PATHS["an option of a callback"].replace("CLASS", name))[1:])


def test_the_short_forms_of_the_command_line(refused: Refused) -> None:
    for option in ("--trainer.callbacks+=evil.Evil", "--model=evil.Evil", "--model.optimizer.class_path=evil.Evil"):
        refused(["fit", "-c", "lora/tinyworld", "--name", "x", option], 2, NOT_LISTED)


def test_a_run_directory_of_somebody_else(refused: Refused) -> None:
    run = Path("runs/theirs")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(Path(given("trainer: {callbacks: [{class_path: evil.Evil}]}")[4]).read_text())
    refused(["export", str(run)], 2, NOT_LISTED)
    refused(["data", "check", "-c", str(run / "config.yaml")], 2, NOT_LISTED)


def test_only_the_user_allows_more(refused: Refused, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    (workplace / "mine.py").write_text("import lightning.pytorch as pl\n\nclass Mine(pl.Callback):\n    pass\n")
    arguments = given("trainer: {callbacks: [{class_path: mine.Mine}]}")[1:]
    for more in (["--allow", "mine"], ["--allow=other,mine.Mine"]):
        _, config = parse([*arguments, *more])
        assert config.trainer.callbacks[0].class_path == "mine.Mine"
    monkeypatch.setenv("LITP_ALLOW", "other, mine")
    parse(arguments)
    monkeypatch.delenv("LITP_ALLOW")
    refused(["fit", *arguments], 2, f"mine.Mine {NOT_LISTED}")  # what was allowed once is not for ever
    refused(given("allow: mine"), 2, "unknown key 'allow'")
    refused(["fit", *arguments, "--allow"], 2, "--allow needs the name of a package")
    refused(["fit", *arguments, "--allow", "*"], 2, "'*' cannot be allowed")
    refused(["fit", *arguments, "--allow", "jsonargparse"], 2, "'jsonargparse' cannot be allowed")


def test_what_recipes_and_pages_name_is_allowed() -> None:
    named = ["torch.optim.AdamW", "torch.optim.lr_scheduler.CosineAnnealingLR", "bitsandbytes.optim.AdamW8bit",
             "prodigyopt.Prodigy", "lightning.pytorch.callbacks.LearningRateMonitor",
             "lightning.pytorch.strategies.ModelParallelStrategy", "lightning.pytorch.loggers.WandbLogger"]  # fmt: skip
    named += [f"{kind.__module__}.{kind.__name__}" for kind in [*OBJECTIVES, *ADAPTERS, *data_classes()]]
    assert [name for name in named if not name.startswith(tuple(f"{entry}." for entry in ALLOWED))] == []


def test_a_command_as_shards(refused: Refused) -> None:
    text = "data: {init_args: {regularization: {shards: 'pipe:touch RAN', fetch_to: here}}}"
    refused(given(text), 2, "'pipe:touch RAN' would run a command of the shell", "--allow pipe")
    parse([*given(text)[1:], "--allow", "pipe"])


def test_the_option_may_stand_anywhere() -> None:
    assert take_allowed(["--allow", "a", "-c", "x", "--allow=b,c"]) == (["-c", "x"], ["a", "b", "c"])
    with pytest.raises(UsageError, match="'a-b' cannot be allowed"):
        take_allowed(["--allow", "a-b"])
