"""Where files stand, and what none of them may contain."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOLDERS = ["kernels", "datamodules", "callbacks", "slurm"]
LONGEST = 500  # lines
NO_HOMES = ["utils.py", "helpers.py", "common.py"]
# A path that exists on one machine only. Written so that this line does not find itself.
PRIVATE_PATH = re.compile(r"(?<![\w.~}])/(?:[w]ork|[t]mp/dev|[r]oot|[h]ome/[r]oot)(?:/|\b)")


@cache
def files() -> list[Path]:
    """Return the files of the project: what git tracks or would add; without git, what is not a build or a run."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [ROOT / name for name in names if name]
    except (FileNotFoundError, subprocess.CalledProcessError):
        outside = re.compile(r"^(\.(?!ci/|gitignore|pre-commit)|runs/|build/|dist/)|__pycache__|\.egg-info/")
        found = [path for path in ROOT.rglob("*") if not outside.search(path.relative_to(ROOT).as_posix())]
    found = [path for path in found if path.is_file()]
    assert ROOT / "pyproject.toml" in found
    return found


def named(paths: Iterable[Path]) -> str:
    return "\n".join(sorted(str(path.relative_to(ROOT)) for path in paths))


@pytest.mark.parametrize("folder", HOLDERS)
def test_folder_holds_a_package_and_is_none(folder: str) -> None:
    """Hugging Face owns the import name `kernels`; transformers would import ours in its place and break."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / f"lit_{folder}" / "__init__.py").exists()


def test_no_package_below_tests() -> None:
    """`tests/kernels/__init__.py` would make pytest put a package named `kernels` on the path."""
    assert not named((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("name", HOLDERS)
def test_import_name_is_not_ours(name: str) -> None:
    """From the repository root, `import kernels` finds Hugging Face's package or nothing, never our folder."""
    program = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s and s.origin else '')"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    origin = run.stdout.strip()
    assert not (origin and Path(origin).is_relative_to(ROOT / name)), origin


@pytest.mark.parametrize("package", ["lit_personalize", *(f"{folder}/lit_{folder}" for folder in HOLDERS)])
def test_package_is_typed_and_whole(package: str) -> None:
    """A folder of modules without `__init__.py` is left out of the wheel."""
    assert (ROOT / package / "py.typed").exists()
    homes = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert not named(home for home in homes if not (home / "__init__.py").exists())


@pytest.mark.parametrize("name", NO_HOMES)
def test_no_file_is_named(name: str) -> None:
    """A file is named after the thing it holds."""
    assert not named(path for path in files() if path.name == name)


def test_no_python_file_is_too_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files() if path.suffix == ".py"}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST}


def test_no_path_of_one_machine() -> None:
    found = []
    for path in files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue  # binary
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if PRIVATE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("cd /" + "work/main", True),
        ('Path("/' + 'tmp/dev")', True),
        ("#SBATCH --output=/" + "root/x.log", True),
        ("https://example.org/" + "work/page", False),
        ("$SCRATCH/" + "worker", False),
        ("/tmp/device", False),
    ],
)
def test_private_path_is_seen(line: str, private: bool) -> None:
    assert bool(PRIVATE_PATH.search(line)) == private
