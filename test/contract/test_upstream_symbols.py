"""The table of upstream symbols against the installed release, our code and the documentation.

Guarantee: all that `tiered_kv.plugin` imports of SGLang, and every argument it reads, is in the
table of its release; that of the installed release is true; `verify()` notices when it isn't; and
the adapters of all releases offer the same.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

import sglang.version

import tiered_kv.plugin
from tiered_kv.core.errors import UpstreamError
from tiered_kv.plugin.hooks import table as hooks
from tiered_kv.plugin.options import refusals
from tiered_kv.plugin.upstream import installed
from tiered_kv.plugin.upstream import release as upstream
from tiered_kv.plugin.upstream.current import symbols
from tiered_kv.plugin.upstream.symbol import Symbol
from tiered_kv.plugin.upstream.v0_5_17 import symbols as v0_5_17
from tiered_kv.plugin.upstream.v0_5_23 import symbols as v0_5_23

PLUGIN = Path(tiered_kv.plugin.__file__).parent
INSTALLED = installed.installed()
SYMBOLS = symbols.SYMBOLS
OTHERS = tuple(
    f"upstream.{folder}." for release, folder in installed.FOLDERS.items() if release != INSTALLED
)
ALL_MODULES = sorted(
    ".".join(path.relative_to(PLUGIN).with_suffix("").parts)
    for path in PLUGIN.rglob("*.py")
    if path.stem != "__init__"
)
#: Those that run on the installed release. The others' tables are checked where they run.
MODULES = [
    module
    for module in ALL_MODULES
    if not module.startswith(OTHERS) and module not in symbols.UNUSED_MODULES
]
DOCS = Path(__file__).parents[2] / "docs"
DOCUMENT = DOCS / "upstream_contract.md"
RELEASES = DOCS / "releases.md"
PARTS = ("arguments", "cache_contract", "hardware", "request_kv", "symbols", "targets")
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: symbol.name)
def test_installed_release(symbol: Symbol) -> None:
    assert upstream.difference_of(symbol) is None


def test_verify_accepts_the_installed_release() -> None:
    upstream.verify()


@pytest.mark.parametrize("release", installed.SUPPORTED)
def test_every_release_has_its_turn(release: str) -> None:
    if release != INSTALLED:
        pytest.skip(f"SGLang {INSTALLED} is installed: see docs/releases.md")
    assert installed.folder_of_installed() == installed.FOLDERS[release]


# -- adapters ----------------------------------------------------------------------------------


def offered(folder: str, part: str) -> dict[str, list[str] | None]:
    """The public names of a part of an adapter; of a function with its parameters."""
    tree = ast.parse((PLUGIN / "upstream" / folder / f"{part}.py").read_text())
    found: dict[str, list[str] | None] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            found[node.name] = [argument.arg for argument in arguments]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({ast.unparse(target): None for target in targets})
    return {name: parameters for name, parameters in found.items() if not name.startswith("_")}


@pytest.mark.parametrize(
    "part", ["arguments", "cache_contract", "hardware", "request_kv", "targets"]
)
def test_all_adapters_offer_what_is_used_of_one(part: str) -> None:
    used = {
        node.attr
        for module in ALL_MODULES
        if not module.startswith("upstream.")
        for node in ast.walk(ast.parse((PLUGIN / f"{module.replace('.', '/')}.py").read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == part
    }
    assert used
    for folder in installed.FOLDERS.values():
        of_first, of_this = offered("v0_5_17", part), offered(folder, part)
        missing = used - of_this.keys()
        assert not missing
        assert {name: of_this[name] for name in used} == {name: of_first[name] for name in used}


def test_every_adapter_has_all_parts() -> None:
    for folder in installed.FOLDERS.values():
        there = {path.stem for path in (PLUGIN / "upstream" / folder).glob("*.py")}
        assert there >= set(PARTS)


# -- verify() notices --------------------------------------------------------------------------


def test_a_renamed_function(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("sglang.srt.mem_cache.registry")
    monkeypatch.delattr(registry, "register_radix_cache_backend")
    with pytest.raises(UpstreamError, match=r"registry\.register_radix_cache_backend is missing"):
        upstream.verify()


def test_another_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixCache

    monkeypatch.setattr(RadixCache, "evict", lambda self, params, urgency: None)
    with pytest.raises(
        UpstreamError, match=r"RadixCache\.evict takes \(self, params, urgency\), not \(self, par"
    ):
        upstream.verify()


def test_a_missing_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, *args: Any) -> None:
        self.tree_cache = None

    init.__signature__ = inspect.signature(upstream.resolve(f"{SCHEDULER}.__init__"))  # type: ignore[attr-defined]
    upstream._set_on_self.cache_clear()
    monkeypatch.setattr(f"{SCHEDULER}.__init__", init)
    try:
        with pytest.raises(UpstreamError, match="Scheduler has no attribute server_args"):
            upstream.verify()
    finally:
        upstream._set_on_self.cache_clear()


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang.version, "__version__", "0.5.18")
    with pytest.raises(UpstreamError) as error:
        upstream.verify()
    assert str(error.value) == (
        "--tiered-kv supports SGLang 0.5.17 and 0.5.23, but 0.5.18 is installed; install "
        "sglang==0.5.17 or sglang==0.5.23, or start without --tiered-kv."
    )


def test_a_local_build_of_the_version_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang.version, "__version__", f"{INSTALLED}+cu128")
    installed.verify_version()


# -- the table is complete ---------------------------------------------------------------------


def runtime_imports(path: Path) -> Iterator[str]:
    """Dotted names that the module imports from sglang, for type checking only ones excepted."""
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("sglang"))


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_in_the_table(module: str) -> None:
    for name in runtime_imports(PLUGIN / f"{module.replace('.', '/')}.py"):
        covering = [s for s in SYMBOLS if s.name == name or s.name.startswith(f"{name}.")]
        assert any(module in symbol.users for symbol in covering), name


def test_every_user_exists() -> None:
    assert {user for symbol in SYMBOLS for user in symbol.users} <= set(ALL_MODULES)


def test_every_hook_target_is_in_the_table() -> None:
    assert {hook.target for hook in hooks.HOOKS} <= {symbol.name for symbol in SYMBOLS}


class Recorder:
    """Notes which attributes are read; every answer makes a rule go on to its next condition."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return 1


def test_every_argument_that_a_refusal_reads_is_in_the_table() -> None:
    recorder = Recorder()
    for rule in refusals.SERVER_ARGS_RULES + refusals.RESOLVED_RULES:
        rule.applies(recorder)
    read = recorder.read | set(refusals.HICACHE_OPTIONS)
    listed = {
        attribute
        for symbol in SYMBOLS
        if symbol.name.endswith(".ServerArgs")
        for attribute in symbol.attributes
    }
    assert read <= listed


def test_every_argument_in_the_table_is_a_field() -> None:
    stock = upstream.resolve("sglang.srt.server_args.ServerArgs")
    fields = getattr(stock, "__dataclass_fields__", None) or stock.__struct_fields__
    for symbol in SYMBOLS:
        if symbol.name.endswith(".ServerArgs"):
            assert set(symbol.attributes) <= set(fields)


# -- what we override --------------------------------------------------------------------------


def overrides() -> Iterator[tuple[str, Any, list[Any]]]:
    """(name, our function, SGLang's functions) of every method that a class of ours overrides."""
    for module in MODULES:
        for _, cls in inspect.getmembers(importlib.import_module(f"tiered_kv.plugin.{module}")):
            if not isinstance(cls, type) or cls.__module__ != f"tiered_kv.plugin.{module}":
                continue
            bases = [vars(base) for base in cls.__mro__ if base.__module__.startswith("sglang.")]
            for name, ours in vars(cls).items():
                theirs = [base[name] for base in bases if inspect.isfunction(base.get(name))]
                if inspect.isfunction(ours) and theirs and not name.startswith("__"):
                    yield f"{cls.__qualname__}.{name}", ours, theirs


def named_parameters(function: Any) -> list[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in variadic]


def test_overrides_take_what_sglang_passes() -> None:
    found = list(overrides())
    assert len(found) > 15
    for name, ours, theirs in found:
        if "kwargs" in inspect.signature(ours).parameters:
            continue
        # SGLang's own classes do not always agree with one another on the names.
        accepted = [named_parameters(function) for function in theirs]
        assert any(named_parameters(ours)[: len(a)] == a for a in accepted), name


# -- the documentation -------------------------------------------------------------------------


def documented() -> dict[str, set[str]]:
    """Symbol -> names, from the tables of docs/upstream_contract.md with three columns."""
    rows: dict[str, set[str]] = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = line.strip("|").split("|")
        owner = re.fullmatch(r"`(sglang[\w.]+)`", cells[0].strip())
        if len(cells) == 3 and owner:
            rows.setdefault(owner[1], set()).update(re.findall(r"`(\w+)`", cells[1]))
    return rows


def test_the_documentation_lists_the_table() -> None:
    table: dict[str, set[str]] = {}
    for symbol in v0_5_17.SYMBOLS:
        owner, _, name = symbol.name.rpartition(".")
        if symbol.parameters is None:
            table.setdefault(symbol.name, set()).update(symbol.attributes)
        else:
            table.setdefault(owner, set()).add(name)
    table["sglang.version"] = {"__version__"}
    del table["sglang.version.__version__"]
    assert documented() == table


def test_the_documentation_lists_the_hooks() -> None:
    text = DOCUMENT.read_text().split("\n## Hooks\n")[1]
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (\w+) \|", text, re.MULTILINE)
    assert rows == [(h.target, h.kind, h.process.name.lower()) for h in hooks.SHARED_HOOKS]


def test_the_documentation_names_the_releases() -> None:
    assert "**SGLang 0.5.17**" in DOCUMENT.read_text()
    for release in installed.SUPPORTED:
        assert f"**{release}**" in RELEASES.read_text()


def test_the_documentation_tells_what_differs() -> None:
    text = RELEASES.read_text()
    differs = v0_5_23.GONE | v0_5_23.LOST.keys() | v0_5_23.PARAMETERS.keys()
    differs |= {*v0_5_23.MODULES_GONE, *(symbol.name for symbol in v0_5_23.ADDED)}
    missing = sorted(
        name for name in differs if f"`{name.removeprefix('sglang.srt.')}`" not in text
    )
    assert not missing


def test_what_differs_is_of_the_table() -> None:
    names = {symbol.name for symbol in v0_5_17.SYMBOLS}
    assert names >= v0_5_23.GONE | v0_5_23.LOST.keys() | v0_5_23.PARAMETERS.keys()
    for module in v0_5_23.MODULES_GONE:
        assert any(name.startswith(f"{module}.") for name in names)
