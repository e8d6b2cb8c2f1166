"""Imports point from later chapters to earlier ones only, and what is heavy waits until it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import avatarl

PACKAGE = Path(avatarl.__file__).parent
CHAPTERS = ("objective", "data", "models", "run_dir", "training", "integrations", "planning", "results", "comparison")
SHELL = {"demo", "cli"}
READERS = {"planning", "results", "comparison", "options", *SHELL}
LATER = {
    "objective": {"data", "models", "run_dir", "training", *READERS},
    "data": {"objective", "models", "run_dir", "training", *READERS},
    "models": {"run_dir", "training", *READERS},
    "run_dir": {"objective", "models", "training", *READERS},
    "training": READERS,
    "integrations": READERS,
    "planning": READERS - {"planning"},
    "results": READERS - {"planning", "results"},
    "comparison": SHELL,
}


def imported_modules(path: Path, package: str) -> set[str]:
    """The dotted names that a source file imports anywhere in it; relative ones resolved against its package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def chapters_named(path: Path, root: Path) -> set[str]:
    """The parts of avatarl, one level down, that a source file of the package imports."""
    package = ".".join(["avatarl", *path.relative_to(root).parent.parts])
    names = [name.split(".") for name in imported_modules(path, package)]
    return {parts[1] for parts in names if parts[0] == "avatarl" and len(parts) > 1}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_imports_nothing_of_the_later_ones(chapter: str):
    sources = sorted((PACKAGE / chapter).rglob("*.py")) or [PACKAGE / f"{chapter}.py"]
    wrong = {str(path.relative_to(PACKAGE)): chapters_named(path, PACKAGE) & LATER[chapter] for path in sources}
    assert not {path: names for path, names in wrong.items() if names}


def test_the_integrations_wait_until_somebody_asks():
    sources = [path for path in PACKAGE.rglob("*.py") if "integrations" not in path.relative_to(PACKAGE).parts]
    assert len(sources) > 50
    assert not [path for path in sources if "integrations" in chapters_named(path, PACKAGE)]


def test_the_check_itself_sees_every_way_of_importing(tmp_path: Path):
    source = tmp_path / "objective" / "fused" / "x.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import avatarl.data\nfrom avatarl import models\nfrom ...training import train\nfrom ... import results\n"
        "def f():\n    from ..config import y\n    from ...cli import main\n"
    )
    assert chapters_named(source, tmp_path) == {"data", "models", "training", "results", "objective", "cli"}


RESULTS = ", ".join(
    f"avatarl.results.{name}" for name in ("evaluate", "generate", "inspect", "play", "publish", "report")
)


@pytest.mark.parametrize("modules", ["avatarl", "avatarl.training.config, avatarl.cli", RESULTS])
def test_settings_and_command_line_import_no_torch(modules: str):
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["AvataRLConfig", "RewardLandscape", "reward_landscape", "avatarl_loss", "linear_avatarl_loss"]
)
def test_the_public_names_are_those_of_the_objective(name: str):
    import avatarl.objective

    assert getattr(avatarl, name) is getattr(avatarl.objective, name)
    assert name in avatarl.__all__ and name in dir(avatarl)


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        avatarl.train  # noqa: B018
