#!/usr/bin/env python3
"""Install this bundle on the machine it was made for. Needs nothing but this Python and torch.

    ./install --prefix ~/tiered_kv
    ~/tiered_kv/serve --model-path MODEL --load-format dummy

Checks every part against SHA256SUMS, unpacks them below the prefix, and prints how to start.
Nothing outside the prefix is touched: the packages lie in PREFIX/site, which PREFIX/env puts first
on PYTHONPATH. Interrupted, it can be run again. The first part (first.tar.xz) will do for gpu_check
as far as it needs neither SGLang nor a server; the others can come later: run it again then.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

CHECKSUMS_NAME = "SHA256SUMS"
FIRST_NAME, REST_NAME = "first.tar.xz", "rest.tar.xz."
DESCRIPTION_NAME = "bundle.json"
COMPLETE_NAME = ".complete"
#: Byte code takes about half as much again.
COMPILED = 1.5


class InstallError(Exception):
    """One sentence: what is wrong and what to do."""


class JoinedParts(io.RawIOBase):
    """Files one after the other, to be read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._file is None:
                if not self._paths:
                    return 0
                self._file = self._paths.pop(0).open("rb")
            n_bytes: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if n_bytes:
                return n_bytes
            self._file.close()
            self._file = None


def say(text: str) -> None:
    sys.stderr.write(f"[install] {text}\n")


def checksums(folder: Path) -> list[tuple[str, str]]:
    """(file name, SHA-256) of every file of the bundle."""
    path = folder / CHECKSUMS_NAME
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise InstallError(
            f"{path} is not there; copy every file of the bundle into one folder."
        ) from None
    pairs = [line.split(maxsplit=1) for line in lines]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InstallError(f"{path} is damaged; copy it again.")
    return [(name, digest) for digest, name in pairs]


def verify(folder: Path) -> list[Path]:
    """The parts of the second archive, in order; none if none of them is there.

    Raises InstallError naming the files that are missing or damaged.
    """
    missing, damaged, rest = [], [], []
    for name, digest in checksums(folder):
        path = folder / name
        if not path.is_file():
            missing.append(name)
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            damaged.append(name)
        if name.startswith(REST_NAME):
            rest.append(path)
    if not rest and all(name.startswith(REST_NAME) for name in missing):
        missing = []
    if missing or damaged:
        raise InstallError(
            f"Of the bundle in {folder} "
            + " and ".join(
                f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {state}"
                for names, state in ((missing, "missing"), (damaged, "damaged"))
                if names
            )
            + "; copy what is named again."
        )
    return sorted(rest)


def check_host(description: dict[str, object]) -> None:
    """Raises InstallError if this interpreter is not the one that the bundle is for."""
    wanted = str(description["python"])
    if platform.python_implementation() != "CPython" or wanted != ".".join(
        platform.python_version_tuple()[:2]
    ):
        raise InstallError(
            f"The bundle is for CPython {wanted}, and this is {platform.python_implementation()} "
            f"{platform.python_version()}; run it with python{wanted}, or build one for yours "
            "(--python-version)."
        )
    for name, version in dict(description["host"]).items():  # type: ignore[call-overload]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise InstallError(
                f"{sys.executable} has no {name}, which the bundle relies on; install {name} "
                f"{version}, or run this with the interpreter that has it."
            ) from None
        if found.split("+")[0] != version:
            say(f"warning: {name} is {found} here, and the bundle was made for {version}")


def is_safe(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Packages into `site`; scripts and headers of a wheel are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            first, _, rest = member.filename.partition("/")
            name = member.filename
            if first.endswith(".data"):
                scheme, _, name = rest.partition("/")
                if scheme not in ("purelib", "platlib") or not name:
                    continue
            if member.is_dir() or not is_safe(name):
                continue
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)


def unpack(archives: Sequence[Sequence[Path]], prefix: Path) -> int:
    """Everything below a new folder, which then takes the prefix's place; how many wheels.

    archives: the parts of each.
    """
    n_wheels = 0
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=f".{prefix.name}.") as scratch:
        new = Path(scratch) / "new"
        (new / "site").mkdir(parents=True)
        for parts in archives:
            n_wheels += unpack_archive(parts, new)
        if n_wheels:
            (new / "wheels").rmdir()
        (new / COMPLETE_NAME).touch()
        if prefix.exists():
            prefix.rename(Path(scratch) / "old")
        new.rename(prefix)
    return n_wheels


def unpack_archive(parts: Sequence[Path], new: Path) -> int:
    """One archive below `new`, its wheels into `new`/site; how many of these there were."""
    n_wheels = 0
    stream = io.BufferedReader(JoinedParts(parts), 1 << 20)
    with stream, tarfile.open(fileobj=stream, mode="r|xz") as archive:
        for member in archive:
            if not (member.isfile() and is_safe(member.name)):
                raise InstallError(f"The bundle holds {member.name!r}: it is not one of ours.")
            archive.extract(member, new, filter="data")
            if member.name.startswith("wheels/"):
                wheel = new / member.name
                unpack_wheel(wheel, new / "site")
                wheel.unlink()
                n_wheels += 1
    return n_wheels


def check_prefix(prefix: Path) -> None:
    """Refuses to replace anything but an earlier installation."""
    if not prefix.exists() or (prefix / COMPLETE_NAME).exists():
        return
    if not prefix.is_dir() or any(prefix.iterdir()):
        raise InstallError(
            f"{prefix} is there and holds something else; name a new or empty folder with --prefix."
        )


def quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


def write_scripts(prefix: Path, description: dict[str, object], *, is_whole: bool) -> None:
    """PREFIX/env, to be sourced, PREFIX/serve, whose flags later ones replace, and gpu_check.

    is_whole: whether there is anything that could serve.
    """
    variables: dict[str, str] = dict(description["environment"])  # type: ignore[call-overload]
    lines = [
        "# Source this: packages of the bundle come first, and kernels are found built.",
        f"PREFIX={quoted(prefix)}",
        'export PYTHONPATH="$PREFIX/site${PYTHONPATH:+:$PYTHONPATH}"',
        f"export TIERED_KV_PYTHON={quoted(Path(sys.executable))}",
        "# SGLang's warm-up asks the server at its own address, which no proxy would find.",
        'export NO_PROXY="${no_proxy:-${NO_PROXY:-}},127.0.0.1"',
        'export no_proxy="$NO_PROXY"',
        *(f'export {name}="{value}"' for name, value in variables.items()),
    ]
    (prefix / "env").write_text("\n".join(lines) + "\n")
    flags = " ".join(str(flag) for flag in description["serve_flags"])  # type: ignore[attr-defined]
    commands = {
        "serve": f'"$TIERED_KV_PYTHON" -m sglang.launch_server --tiered-kv {flags} "$@"',
        "gpu_check": '"$PREFIX/source/scripts/gpu_check" "$@"',
    }
    for name, command in commands.items():
        if name == "serve" and not is_whole:
            continue
        script = prefix / name
        script.write_text(f"#!/bin/sh\n. {quoted(prefix)}/env\nexec {command}\n")
        script.chmod(0o755)


def compile_packages(site: Path) -> None:
    """On all cores, so that the first start need not do it on one; what can't be is left."""
    say("compiling the packages")
    command = [sys.executable, "-m", "compileall", "-q", "-q", "-j", "0", str(site)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def install(folder: Path, prefix: Path, *, is_compiled: bool = True) -> None:
    """Raises InstallError."""
    description = json.loads((folder / DESCRIPTION_NAME).read_text())
    check_prefix(prefix)
    check_host(description)
    say(f"checking the files in {folder}")
    rest = verify(folder)
    free = shutil.disk_usage(next(p for p in (prefix, *prefix.parents) if p.exists())).free
    needed = int(COMPILED * description["unpacked_bytes"])
    if free < needed:
        raise InstallError(
            f"{prefix} has {free >> 20} MiB free and {needed >> 20} MiB are needed; free some, or "
            "name another --prefix."
        )
    say(f"unpacking {1 + len(rest)} parts into {prefix}")
    archives = [[folder / FIRST_NAME], *([rest] if rest else [])]
    try:
        n_wheels = unpack(archives, prefix)
    except tarfile.CompressionError:
        raise InstallError(
            f"{sys.executable} cannot read xz (it was built without lzma); run this with another "
            f"python{description['python']}."
        ) from None
    (prefix / DESCRIPTION_NAME).write_text(json.dumps(description, indent=1) + "\n")
    write_scripts(prefix, description, is_whole=bool(rest))
    if is_compiled:
        compile_packages(prefix / "site")
    say(f"{n_wheels} packages installed")
    if not rest:
        say(f"{REST_NAME}* are not there: nothing can be served before they are installed as well")
    serve = f"start a server:   {prefix}/serve --model-path MODEL\n" if rest else ""
    sys.stdout.write(
        f"{serve}measure this GPU: {prefix}/gpu_check --within 15m --out gpu_check\n"
        f"anything else:    . {prefix}/env; $TIERED_KV_PYTHON ...\n"
    )


def absolute(prefix: Path) -> Path:
    """Raises InstallError for a user without a home."""
    try:
        return prefix.expanduser().absolute()
    except RuntimeError:
        raise InstallError(
            f"There is no such home as in {prefix}; give --prefix a whole path."
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="install", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prefix",
        type=Path,
        default=Path("~/tiered_kv"),
        help="folder to install into; an earlier installation there is replaced (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave that to the first start, which then waits"
    )
    chosen = parser.parse_args(arguments)
    if sys.version_info < (3, 11, 4):
        say(f"error: Python 3.11.4 or later is needed; this is {platform.python_version()}.")
        return 1
    folder = Path(__file__).resolve().parent
    try:
        prefix = absolute(chosen.prefix)
        install(folder, prefix, is_compiled=not chosen.no_compile)
    except InstallError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error.filename or folder}: {error.strerror}; check it and run this again.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
