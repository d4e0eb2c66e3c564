"""No shipped line unpickles, evaluates, unpacks or hands text to a shell; and the page names every test of these."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("lit_personalize", "kernels", "datamodules", "callbacks", "slurm", "benchmarks")
PAGE = ROOT / "docs" / "security.md"
FORBIDDEN = re.compile(
    r"(c?[pP]ickle|_pickle|dill|cloudpickle|joblib|marshal|shelve|jsonpickle)\.(loads?|Unpickler|open|decode)"
    r"|yaml\.(load|load_all|unsafe_load|unsafe_load_all|full_load|full_load_all)"
    r"|(builtins\.)?(eval|exec|compile)|os\.(system|popen|exec\w*|spawn\w*)|runpy\.\w+"
    r"|.*\.(extract|extractall|unpack_archive)|torch\.hub\.\w+|torch\.jit\.load"
)
OPTIONS = {"weights_only": False, "allow_pickle": True, "shell": True, "trust_remote_code": True}
JUSTIFIED = {
    "lit_personalize/sharded_state.py: class _IndexUnpickler": "finds only the classes of an index of torch's own",
}
"""`file: call` of what is right all the same, and why."""


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every call that may run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "_pickle", "marshal", "shelve", "dill"):
            yield node.lineno, f"from {node.module} import {', '.join(alias.name for alias in node.names)}"
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            yield node.lineno, f"class {node.name}"
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        given = {word.arg: word.value for word in node.keywords}
        bad = [w for w, v in OPTIONS.items() if w in given and not _is(given[w], not v)]
        if name == "torch.load" and not _is(given.get("weights_only"), True):
            bad.append("torch.load without weights_only=True")
        if bad or FORBIDDEN.fullmatch(name):
            yield node.lineno, f"{name}({', '.join(bad)})"


def _dotted(node: ast.AST) -> str:
    """`a.b.c`; what is called to get an object stands as `?`."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _is(value: ast.AST | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def test_no_shipped_code_runs_what_a_file_says() -> None:
    files = [path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200, "nothing was searched"
    found = []
    for path in files:
        for line, call in forbidden(ast.parse(path.read_text(encoding="utf-8"))):
            where = path.relative_to(ROOT).as_posix()
            if f"{where}: {call}" not in JUSTIFIED:
                found.append(f"{where}:{line}: {call}")
    assert found == []


@pytest.mark.parametrize("line", [
    "pickle.load(f)", "pickle.loads(b)", "pickle.Unpickler(f)", "class A(pickle.Unpickler): ...",
    "from pickle import load", "yaml.load(t)",
    "yaml.load(t, Loader=yaml.SafeLoader)", "yaml.unsafe_load(t)", "eval(x)", "exec(x)", "os.system(x)", "os.popen(x)",
    "tar.extractall(p)", "tarfile.open(p).extractall(p, filter='data')", "subprocess.run(x, shell=True)",
    "subprocess.run(x, shell=asked)", "torch.load(p)", "torch.load(p, weights_only=False)",
    "np.load(p, allow_pickle=1)",
    "AutoModel.from_pretrained(p, trust_remote_code=True)", "torch.load(p, weights_only=trusted)", "torch.hub.load(x)",
])  # fmt: skip
def test_each_such_line_would_be_found(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


@pytest.mark.parametrize("line", [
    "torch.load(p, weights_only=True)", "yaml.safe_load(t)", "np.load(p)", "module.eval()", "re.compile(x)",
    "ast.literal_eval(x)", "trainer.fit(m, weights_only=True)", "torch.compile(m)", "np.load(p, allow_pickle=False)",
])  # fmt: skip
def test_lines_that_run_nothing_are_not(line: str) -> None:
    assert not list(forbidden(ast.parse(line)))


def test_the_page_names_every_test_and_no_other() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}
    proofs = {"test_the_payload_would_run", "test_each_such_line_would_be_found", "test_lines_that_run_nothing_are_not",
              "test_the_page_names_every_test_and_no_other"}  # fmt: skip
    assert named == tests - proofs
