"""What environment.json says of the source tree that a run was trained with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from avatarl.run_dir import environment


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A source tree under git with the package in it, and in it an environment with the package installed."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("avatarl", "lib/avatarl"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "__init__.py").touch()
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "first")
    return tree


def test_the_package_is_the_one_that_runs():
    assert (environment.PACKAGE / "run_dir" / "environment.py").samefile(environment.__file__)


def test_a_source_tree_has_its_revision(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "PACKAGE", tree / "avatarl")
    assert environment._git_revision() == git(tree, "rev-parse", "--short", "HEAD")
    (tree / "avatarl" / "__init__.py").write_text("x = 1")
    assert environment._git_revision() == git(tree, "rev-parse", "--short", "HEAD") + "-dirty"


def test_an_installed_package_has_none(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "PACKAGE", tree / "lib" / "avatarl")
    assert environment._git_revision() is None
