"""Imports run downward only, and the light packages stay light.

`lit_kernels`, `lit_datamodules` and `lit_slurm` import nothing of ours; `lit_personalize` imports `lit_kernels`;
`lit_callbacks` imports both. Inside functions, so that `litp --help` stays fast, `lit_personalize.cli` may also import
`lit_datamodules` and `lit_slurm`. Where a run is composed, three more modules may look up: `configuration` imports
`lit_datamodules`, `fitting` and `profiling` import `lit_callbacks`. Elsewhere YAML names data and callbacks by
`class_path`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lit_personalize": ROOT / "lit_personalize",
    "lit_kernels": ROOT / "kernels/lit_kernels",
    "lit_datamodules": ROOT / "datamodules/lit_datamodules",
    "lit_callbacks": ROOT / "callbacks/lit_callbacks",
    "lit_slurm": ROOT / "slurm/lit_slurm",
}
ALLOWED: dict[str, set[str]] = {
    "lit_kernels": set(),
    "lit_datamodules": set(),
    "lit_slurm": set(),
    "lit_personalize": {"lit_kernels"},
    "lit_callbacks": {"lit_personalize", "lit_kernels"},
}
LAZILY = {  # by the first part of a module's path in lit_personalize
    "cli": {"lit_datamodules", "lit_slurm"},
    "configuration.py": {"lit_datamodules"},
    "fitting.py": {"lit_callbacks"},
    "profiling.py": {"lit_callbacks"},
}
OURS = re.compile(rf"({'|'.join(FOLDERS)})[.:]\w")


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, top-level name, whether inside a function) of every import below `node`.

    Of a module that is imported by a name which only running tells, every string that names one of ours counts.
    """
    if isinstance(node, ast.Module) and any(_is_dynamic(call) for call in ast.walk(node)):
        constants = (n for n in ast.walk(node) if isinstance(n, ast.Constant))
        yield from ((n.lineno, match[1], False) for n in constants if (match := OURS.match(str(n.value))))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name.partition(".")[0], lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield child.lineno, (child.module or "").partition(".")[0], lazy
        elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in ("import_module", "__import__"):
            if child.args and isinstance(child.args[0], ast.Constant):
                yield child.lineno, str(child.args[0].value).partition(".")[0], lazy
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, inside)


def _is_dynamic(node: ast.AST) -> bool:
    """Whether a call imports a module whose name is no literal."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in ("import_module", "__import__"):
        return False
    return not (node.args and isinstance(node.args[0], ast.Constant))


def upward(source: str, package: str, part: str = "") -> list[str]:
    """Return the imports in `source`, a module of `package` below `part`, that break the order of the layers."""
    broken = []
    for line, name, lazy in imports(ast.parse(source)):
        allowed = ALLOWED[package] | (LAZILY.get(part, set()) if lazy and package == "lit_personalize" else set())
        if name in FOLDERS and name != package and name not in allowed:
            broken.append(f"{line}: {package}{part and f'/{part}'} imports {name}")
    return broken


def modules(package: str) -> list[Path]:
    found = sorted(FOLDERS[package].rglob("*.py"))
    assert found, f"{FOLDERS[package]} holds no module"
    return found


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_run_downward(package: str) -> None:
    broken = []
    for path in modules(package):
        part = path.relative_to(FOLDERS[package]).parts[0]
        broken += [f"{path.relative_to(ROOT)}:{found}" for found in upward(path.read_text(), package, part)]
    assert not broken, "\n".join(broken)


def test_slurm_needs_nothing_heavier_than_pyyaml() -> None:
    """It runs on login nodes where torch is not installed."""
    light = sys.stdlib_module_names | {"yaml", "lit_slurm"}
    heavy = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules("lit_slurm")
        for line, name, _ in imports(ast.parse(path.read_text()))
        if name not in light
    ]
    assert not heavy, "\n".join(heavy)


@pytest.mark.parametrize("package", ["lit_personalize", "lit_slurm"])
def test_import_loads_no_torch(package: str) -> None:
    program = f"import sys, {package}; print(*sorted({{'torch', 'lightning', 'numpy'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder.parent) for folder in FOLDERS.values())}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not run.stdout.strip(), f"import {package} loads {run.stdout}"


@pytest.mark.parametrize(
    ("package", "part", "source", "broken"),
    [
        ("lit_personalize", "", "import lit_kernels.attention", False),
        ("lit_personalize", "", "from lit_datamodules.folder import read", True),
        ("lit_personalize", "", "def f():\n    import lit_datamodules", True),
        ("lit_personalize", "", "from importlib import import_module\nimport_module('lit_callbacks.ema')", True),
        ("lit_personalize", "cli", "def f():\n    from lit_datamodules import folder", False),
        ("lit_personalize", "cli", "def f():\n    if True:\n        import lit_slurm", False),
        ("lit_personalize", "cli", "import lit_datamodules", True),
        ("lit_personalize", "cli", "class A:\n    import lit_slurm", True),
        ("lit_personalize", "cli", "def f():\n    import lit_callbacks", True),
        ("lit_personalize", "fitting.py", "def f():\n    from lit_callbacks.ema import Ema", False),
        ("lit_personalize", "fitting.py", "from lit_callbacks.ema import Ema", True),
        ("lit_personalize", "fitting.py", "def f():\n    import lit_datamodules", True),
        ("lit_personalize", "configuration.py", "def f():\n    import lit_datamodules", False),
        ("lit_personalize", "", "A = ('lit_callbacks.ema:Ema',)\nimportlib.import_module(A[0].split(':')[0])", True),
        ("lit_personalize", "fitting.py", "def f(name):\n    import_module(name)\nf('lit_callbacks.ema')", True),
        ("lit_personalize", "", "NAME = 'lit_callbacks.ema'", False),
        ("lit_callbacks", "fitting.py", "def f():\n    import lit_datamodules", True),
        ("lit_kernels", "", "import torch, lit_personalize", True),
        ("lit_datamodules", "", "try:\n    import lit_kernels\nexcept ImportError:\n    pass", True),
        ("lit_slurm", "", "import lit_personalize.errors", True),
        ("lit_callbacks", "", "from lit_personalize.batch import Batch\nimport lit_kernels", False),
        ("lit_callbacks", "", "import lit_datamodules", True),
        ("lit_callbacks", "", "from . import ema", False),
    ],
)
def test_the_check_sees(package: str, part: str, source: str, broken: bool) -> None:
    assert bool(upward(source, package, part)) == broken
