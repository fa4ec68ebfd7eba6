"""Wheels from the package index, kept in a folder so that an interrupted build goes on."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bundle.errors import BundleError
from bundle.packages import Requirement, normalized

#: pip matches these exactly, so every glibc that packages are built for is named.
GLIBC_MINORS = (5, 12, 17, 24, 26, 27, 28, 31, 34, 35)
#: Fewer starts of pip than one each; little to fetch again if this is interrupted.
BATCH = 8


def platforms(glibc_minor: int) -> list[str]:
    """Wheel platforms that run where glibc 2.`glibc_minor` is."""
    names = [f"manylinux_2_{m}_x86_64" for m in reversed(GLIBC_MINORS) if m <= glibc_minor]
    return [*names, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def wheel_name_version(path: Path) -> tuple[str, str]:
    """From the file's name."""
    name, version, *_ = path.name.split("-")
    return normalized(name), version.split("+")[0]


def is_whole(path: Path) -> bool:
    """Whether a wheel's directory can be read: it is at the end of the file."""
    try:
        with zipfile.ZipFile(path) as wheel:
            return any(name.endswith(".dist-info/RECORD") for name in wheel.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def find_wheel(folder: Path, requirement: Requirement, python_version: str) -> Path | None:
    """A wheel in `folder` that meets the requirement on that Python."""
    tag = "cp" + python_version.replace(".", "")
    key = normalized(requirement.name), requirement.version
    for path in sorted(folder.glob("*.whl")):
        python_tag, abi_tag = path.stem.split("-")[-3:-1]
        fits = (
            tag in python_tag.split(".")
            or any(part in ("py3", "py2") for part in python_tag.split("."))
            or (abi_tag == "abi3" and is_older(python_tag, tag))
        )
        if wheel_name_version(path) == key and fits and is_whole(path):
            return path
    return None


def is_older(python_tag: str, tag: str) -> bool:
    """Whether a stable-ABI wheel for cp38, say, is for a Python up to `tag`."""
    minors = [re.fullmatch(r"cp3(\d+)", part) for part in (python_tag, tag)]
    return all(minors) and int(minors[0][1]) <= int(minors[1][1])  # type: ignore[index]


def download(
    requirements: Sequence[Requirement],
    folder: Path,
    python_version: str,
    glibc_minor: int,
    progress: Callable[[int], object] = lambda _n: None,
) -> list[Path]:
    """One wheel each, in order; those that are there already are not fetched again.

    `progress` hears how many more are there. Raises BundleError naming what could not be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [r for r in requirements if find_wheel(folder, r, python_version) is None]
    progress(len(requirements) - len(missing))
    if missing and importlib.util.find_spec("pip") is None:
        raise BundleError(
            f"{sys.executable} has no pip to download with; run this with a Python that has it "
            "(python -m ensurepip)."
        )
    for batch in batches(missing):
        fetch(batch, folder, python_version, glibc_minor)
        progress(len(batch))
    found = [find_wheel(folder, r, python_version) for r in requirements]
    lost = [
        f"{r.name}=={r.version}" for r, path in zip(requirements, found, strict=True) if not path
    ]
    if lost:
        raise BundleError(
            f"pip gave other files than asked for {', '.join(lost)}; delete {folder} and run this "
            "again."
        )
    return [path for path in found if path is not None]


def batches(requirements: Sequence[Requirement]) -> Iterator[Sequence[Requirement]]:
    for at in range(0, len(requirements), BATCH):
        yield requirements[at : at + BATCH]


def fetch(
    batch: Sequence[Requirement], folder: Path, python_version: str, glibc_minor: int
) -> None:
    """One run of pip; files appear in `folder` by renaming, so none is ever half there."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-qq", "--implementation", "cp"]
    command += ["--python-version", python_version]
    for name in platforms(glibc_minor):
        command += ["--platform", name]
    names = [f"{r.name}=={r.version}" for r in batch]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part.") as scratch:
        result = subprocess.run([*command, "--dest", scratch, *names], check=False)
        if result.returncode != 0:
            raise BundleError(
                f"pip could not download one of {', '.join(names)} for Python {python_version}, "
                "see above; check the network and pip's index settings, or set --glibc to what the "
                "host has. Running this again goes on from here."
            )
        for path in Path(scratch).glob("*.whl"):
            path.replace(folder / path.name)


def build_own_wheel(root: Path, into: Path) -> Path:
    """This checkout as a wheel. Raises BundleError."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(into), str(root)]
    if subprocess.run(command, check=False).returncode != 0:
        raise BundleError(f"pip could not build a wheel from {root}, see above.")
    (wheel,) = into.glob("sglang_tiered_kv-*.whl")
    return wheel
