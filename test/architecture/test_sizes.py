"""Files and functions stay short enough to read in one sitting.

A file has up to 400 lines, a function up to 70.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE_LIMIT = 400
FUNCTION_LIMIT = 70


def python_files() -> list[Path]:
    files = [
        path
        for folder in ("python", "test", "benchmark", "harness", "scripts", "sgl-kernel-ext")
        for path in (ROOT / folder).rglob("*.py")
    ]
    files += [path for path in (ROOT / "scripts").iterdir() if is_python_script(path)]
    assert len(files) > 20
    return files


def is_python_script(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first_line = file.readline()
    return b"python" in first_line and first_line.startswith(b"#!")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code, without the docstring: explaining more must not cost anything."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return total
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return total - (docstring.end_lineno - docstring.lineno + 1)


def test_file_length() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()
    }
    assert {name: n for name, n in lengths.items() if n > FILE_LIMIT} == {}


def test_function_length() -> None:
    too_long = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": function_lines(function)
        for path in python_files()
        for function in functions(ast.parse(path.read_text()))
        if function_lines(function) > FUNCTION_LIMIT
    }
    assert too_long == {}
