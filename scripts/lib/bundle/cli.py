"""The command line of `scripts/offline_bundle`, and the order of its work."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bundle import install, jit, trim
from bundle.download import build_own_wheel, download
from bundle.errors import BundleError
from bundle.packages import REQUIREMENTS, Requirement, parse_freeze, parse_requirements, wanted
from bundle.parts import sha256_of, write_checksums, write_parts

ROOT = Path(__file__).parents[3]
#: What the host has itself: checked by `install`.
HOST = {"torch": "2.11.0", "triton": "3.6.0"}
#: In the first part, beside this project: what gpu_check needs where there are torch and Triton.
FIRST_PACKAGES = ("numpy", "tqdm", "xxhash")
#: Beside the wheel: what scripts/gpu_check runs on.
SOURCES = (
    "pyproject.toml",
    "README.md",
    "scripts",
    "benchmark",
    "harness",
    "test",
    "python",
    "sgl-kernel-ext",
)
NO_SOURCE = re.compile(r"benchmark/results/|.*\.(png|pyc)$|.*__pycache__")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)B?")
#: Hopper's default backend and these features need packages that are left out.
SERVE_FLAGS = (
    *("--attention-backend", "flashinfer", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--mm-feature-transport", "cpu", "--disable-cuda-graph"),
)


def say(text: str) -> None:
    sys.stderr.write(f"[offline_bundle] {text}\n")
    sys.stderr.flush()


def size_of(text: str) -> int:
    """Bytes: "60MiB", "50MB", "1000000"."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 60MiB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMG".index(match[2].upper() or " "))


def in_mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"


def default_cache() -> Path:
    """Raises BundleError for a user without a home."""
    base = os.environ.get("TIERED_KV_CACHE_DIR")
    xdg = os.environ.get("XDG_CACHE_HOME")
    try:
        if base:
            return Path(base).expanduser() / "bundle"
        return (Path(xdg) if xdg else Path.home() / ".cache") / "tiered_kv" / "bundle"
    except RuntimeError:
        raise BundleError("This user has no home to keep downloads in; give --cache.") from None


class Progress:
    """Counts packages; a bar where there is a terminal, a line now and then elsewhere."""

    def __init__(self, n_total: int) -> None:
        self._n_total, self._n_done, self._said_s = n_total, 0, 0.0

    def __call__(self, n: int) -> None:
        self._n_done += n
        is_last = self._n_done >= self._n_total
        if sys.stderr.isatty():
            bar = "#" * (30 * self._n_done // max(1, self._n_total))
            end = "\n" if is_last else ""
            sys.stderr.write(f"\r[{bar:<30}] {self._n_done}/{self._n_total} packages{end}")
            sys.stderr.flush()
        elif is_last or time.monotonic() - self._said_s > 5:
            say(f"{self._n_done} of {self._n_total} packages are there")
            self._said_s = time.monotonic()


def bundled_requirements() -> list[Requirement]:
    return parse_requirements(REQUIREMENTS.read_text())


def chosen_requirements(options: argparse.Namespace) -> list[Requirement]:
    requirements = bundled_requirements()
    if options.host_packages is None:
        return requirements
    try:
        host = parse_freeze(options.host_packages.read_text())
    except OSError as error:
        raise BundleError(
            f"--host-packages {options.host_packages} can't be read ({error.strerror})."
        ) from None
    needed = wanted(requirements, host)
    say(f"the host has {len(requirements) - len(needed)} of {len(requirements)} packages itself")
    return needed


def trimmed(wheels: Sequence[Path], arch: str, scratch: Path) -> list[Path]:
    """The wheels with what is used of them, and as they compress best: not compressed."""
    result = []
    for wheel in wheels:
        target = scratch / wheel.name
        left_out = trim.trim_wheel(wheel, target, trim.rule_for(wheel, arch))
        if left_out > 1 << 20:
            say(f"of {wheel.name.split('-')[0]} {in_mib(left_out)} are left out")
        result.append(target)
    return result


def is_first(wheel: Path) -> bool:
    """Whether a wheel is in the first part."""
    return wheel.name.split("-")[0] in FIRST_PACKAGES


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(name in the bundle, path): what git knows or would add, without results and pictures."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "--", *SOURCES],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:
        paths = [path for name in SOURCES for path in (root / name).rglob("*")]
        names = [str(path.relative_to(root)) for path in paths]
        names += [name for name in SOURCES if (root / name).is_file()]
    for name in sorted(set(names)):
        if not NO_SOURCE.match(name) and (root / name).is_file():
            yield f"source/{name}", root / name


def unpacked_bytes(wheels: Sequence[Path], others: Sequence[tuple[str, Path]]) -> int:
    import zipfile

    total = sum(path.stat().st_size for _, path in others)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            total += sum(info.file_size for info in archive.infolist())
    return total


def in_archive(wheels: Sequence[Path]) -> list[tuple[str, Path]]:
    return [(f"wheels/{wheel.name}", wheel) for wheel in wheels]


def describe(
    options: argparse.Namespace, wheels: Sequence[Path], others: Sequence[tuple[str, Path]]
) -> dict[str, Any]:
    """bundle.json."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    environment = {"SGLANG_FLASHINFER_USE_PAGED": "1", "FLASHINFER_CUDA_ARCH_LIST": options.arch}
    if any(name.startswith(f"{jit.TVM_FOLDER}/") for name, _ in others):
        environment["TVM_FFI_CACHE_DIR"] = f"$PREFIX/{jit.TVM_FOLDER}"
    return {
        "schema": 1,
        "python": options.python_version,
        "arch": options.arch,
        "host": HOST,
        "commit": commit.stdout.strip() or None,
        "environment": environment,
        "serve_flags": list(SERVE_FLAGS),
        "unpacked_bytes": unpacked_bytes(wheels, others),
        "wheels": {
            wheel.name: {"bytes": wheel.stat().st_size, "sha256": sha256_of(wheel)}
            for wheel in wheels
        },
    }


Entries = Sequence[tuple[str, Path]]
"""(name in the bundle, path)."""


def write_bundle(
    out: Path, part_bytes: int, first: Entries, rest: Entries, description: dict[str, Any]
) -> list[str]:
    """All files of a bundle in `out`; their names. first: what is in the first part."""
    out.mkdir(parents=True, exist_ok=True)
    digests = write_parts(first, rest, out, part_bytes)
    (out / install.DESCRIPTION_NAME).write_text(json.dumps(description, indent=1) + "\n")
    shutil.copyfile(install.__file__, out / "install")
    (out / "install").chmod(0o755)
    digests += [(name, sha256_of(out / name)) for name in (install.DESCRIPTION_NAME, "install")]
    write_checksums(digests, out)
    return [name for name, _ in digests]


def build(options: argparse.Namespace) -> None:
    """Raises BundleError."""
    cache = options.cache or default_cache()
    requirements = chosen_requirements(options)
    wheels_folder = cache / f"wheels-cp{options.python_version.replace('.', '')}"
    say(f"{len(requirements)} packages from the index, kept in {wheels_folder}")
    wheels = download(
        requirements,
        wheels_folder,
        options.python_version,
        options.glibc,
        Progress(len(requirements)),
    )
    prebuilt = options.prebuilt_jit
    if options.build_jit:
        prebuilt = prebuilt or cache / f"jit-{options.arch}"
        jit.build(prebuilt, options.jit_python, options.arch, say)
    with tempfile.TemporaryDirectory(prefix="tiered_kv_bundle_") as folder:
        scratch = Path(folder)
        wheels = trimmed(wheels, options.arch, scratch)
        say("building this project's wheel")
        first = [build_own_wheel(ROOT, scratch), *filter(is_first, wheels)]
        rest = [wheel for wheel in wheels if not is_first(wheel)]
        others, kernels = list(source_files(ROOT)), []
        if prebuilt is not None:
            kernels = jit.files(prebuilt)
            rest.append(jit.flashinfer_wheel(prebuilt, bundled_requirements(), scratch))
        description = describe(options, [*first, *rest], [*others, *kernels])
        say("compressing (minutes)")
        names = write_bundle(
            options.out,
            options.part_size,
            [*in_archive(first), *others],
            [*in_archive(rest), *kernels],
            description,
        )
    sizes = {name: (options.out / name).stat().st_size for name in names}
    largest = sorted(description["wheels"].items(), key=lambda item: -item[1]["bytes"])[:8]
    for name, facts in largest:
        say(f"  {in_mib(facts['bytes']):>10}  {name}")
    parts = [name for name in names if name.startswith((install.FIRST_NAME, install.REST_NAME))]
    for name in parts:
        say(f"  {in_mib(sizes[name]):>10}  {name}")
    say(
        f"{in_mib(sum(sizes.values()))} in {len(parts)} parts of at most "
        f"{in_mib(options.part_size)} in {options.out}, {in_mib(description['unpacked_bytes'])} "
        "unpacked"
    )
    if prebuilt is None:
        say(
            "no kernels are prebuilt: the host needs nvcc and ninja, and minutes for its first "
            "start; --build-jit builds them here"
        )
    say(f"copy {options.out} to the host and run ./install --prefix FOLDER there")


ABOUT = """\
Builds a bundle with which a CUDA host without a network serves with --tiered-kv. The host has
Linux on x86-64, Python, torch 2.11 for CUDA 13 and Triton; the bundle brings the smallest set of
packages with which `python3 -m sglang.launch_server --tiered-kv --attention-backend flashinfer`
starts, this checkout as a wheel, and the files of scripts/gpu_check.

  scripts/offline_bundle --out bundle                 downloads about 150 MiB, once
  scripts/offline_bundle --out bundle --build-jit     kernels too (needs nvcc, torch, 10 minutes)

  on the host:  python3 -m pip list --format=freeze > host.txt      (optional, before)
  here:         scripts/offline_bundle --out bundle --host-packages host.txt
  on the host:  ./install --prefix ~/tiered_kv && ~/tiered_kv/serve --model-path MODEL
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="scripts/offline_bundle",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--out", type=Path, required=True, help="folder for the bundle; older parts are replaced")
    add("--part-size", type=size_of, default="60MiB", help="of each part (default: %(default)s)")
    add(
        "--python-version", default="3.12", choices=("3.11", "3.12"),
        help="of the host (default: %(default)s)",
    )  # fmt: skip
    add("--arch", default="9.0a", help="compute capability of its GPU (default: %(default)s, H100 "
        "and H200; sgl_kernel then lacks FlashAttention 3)")  # fmt: skip
    add("--glibc", type=int, default=34, metavar="N", help="the host's glibc is 2.N or later "
        "(default: %(default)s, which SGLang's own wheel needs)")  # fmt: skip
    add("--host-packages", type=Path, metavar="FILE", help="`python3 -m pip list --format=freeze` "
        "of the host: what it has is left out")  # fmt: skip
    add("--prebuilt-jit", type=Path, metavar="DIR", help="add FlashInfer's and SGLang's kernels, "
        "built before (a folder that --build-jit made)")  # fmt: skip
    add("--build-jit", action="store_true", help="build those kernels that are not in "
        "--prebuilt-jit (default: a folder in the cache) yet")  # fmt: skip
    add("--jit-python", default=sys.executable, metavar="PYTHON", help="interpreter that has "
        "SGLang, to build them with (default: this one)")  # fmt: skip
    add("--cache", type=Path, help="where downloads are kept (default: ~/.cache/tiered_kv/bundle)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        build(options)
    except BundleError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped; running it again goes on from here")
        return 130
    return 0
