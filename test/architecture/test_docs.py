"""What the documents point at is there: links, files, tests; and no merge left its marks."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("python", "test", "benchmark", "sgl-kernel-ext", "scripts", "docs", "docker")
#: ADRs say what was found when they were written; the changelog what was there then.
LIVING = [
    *(path for path in (ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
DOCUMENTS = [*LIVING, ROOT / "CHANGELOG.md", *(ROOT / "docs" / "adr").glob("*.md")]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.fixture(scope="module")
def files() -> set[str]:
    """Every file of the tree, with a slash in front."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {f"/{path.relative_to(ROOT)}" for path in [*found, *ROOT.iterdir()]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_no_marks_of_a_merge(document: Path) -> None:
    marks = re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", document.read_text(), re.MULTILINE)
    assert not marks


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    inside = [target for target in targets if "://" not in target]
    missing = [target for target in inside if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", LIVING, ids=names(LIVING))
def test_files_that_are_named_exist(document: Path, files: set[str]) -> None:
    """Whole paths or their ends, in backticks; those of SGLang are named with their folder, too."""
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.py)`", document.read_text()))
    missing = {name for name in named if not any(file.endswith(f"/{name}") for file in files)}
    assert not missing - upstream(missing), f"{document.name} names files that are not there"


@functools.cache
def sglang_files() -> frozenset[str]:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    root = Path(spec.submodule_search_locations[0])
    return frozenset(f"/{path.relative_to(root)}" for path in root.rglob("*.py"))


def upstream(named: set[str]) -> set[str]:
    """Those of `named` that are SGLang's."""
    return {name for name in named if any(path.endswith(f"/{name}") for path in sglang_files())}


def test_guarantees_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    folders = "|".join(path.name for path in (ROOT / "test").iterdir() if path.is_dir())
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", text))
    assert len(named) > 50
    assert not [name for name in named if not (ROOT / "test" / name).exists()]
