"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmark" / "results"


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m MODULE`: its docstring's first paragraph, the options, and then the rest."""
    about = (doc or "").split("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about[0],
        epilog="\n\n".join(about[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
