"""Wheels for tests of the offline bundle, which put scripts/lib on the path first."""

from __future__ import annotations

from pathlib import Path

from bundle import trim


def wheel(folder: Path, name: str, files: dict[str, bytes], tag: str = "py3-none-any") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    dist_info = f"{name}-1.0.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    trim.write_wheel(path, dist_info, {**files, f"{dist_info}/METADATA": about})
    return path
