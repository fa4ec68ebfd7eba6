"""Wheels with only the files that are needed, and not compressed: the archive around them is."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from bundle.errors import BundleError

#: The oldest time a zip file can hold: equal contents then give equal wheels.
EPOCH = (1980, 1, 1, 0, 0, 0)


def record_hash(data: bytes) -> str:
    """As RECORD has it: sha256=, urlsafe base64 without padding (PEP 376, PEP 427)."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"


def write_wheel(path: Path, dist_info: str, files: dict[str, bytes]) -> None:
    """A wheel of these files, by name, and a RECORD of them in the folder `dist_info`."""
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    record_name = f"{dist_info}/RECORD"
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as wheel:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = 0o100644 << 16
            wheel.writestr(info, files[name])
            rows.writerow((name, record_hash(files[name]), len(files[name])))
        rows.writerow((record_name, "", ""))
        wheel.writestr(zipfile.ZipInfo(record_name, EPOCH), record.getvalue())
    partial.replace(path)


def trim_wheel(source: Path, target: Path, is_kept: Callable[[str], bool]) -> int:
    """`source` with only the files that `is_kept` says, and its dist-info; the bytes of the others.

    Raises BundleError if nothing beside the dist-info is kept: the package is another than the
    rule was written for.
    """
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        dist_infos = {name.split("/")[0] for name in names if ".dist-info/" in name}
        if len(dist_infos) != 1:
            raise BundleError(f"{source} is no wheel: delete it, and it is downloaded again.")
        (dist_info,) = dist_infos
        is_in = {name: name.startswith(f"{dist_info}/") or is_kept(name) for name in names}
        n_left_out = sum(wheel.getinfo(name).file_size for name in names if not is_in[name])
        kept = {name: wheel.read(name) for name in names if is_in[name]}
    kept.pop(f"{dist_info}/RECORD", None)
    if all(name.startswith(f"{dist_info}/") for name in kept):
        raise BundleError(
            f"Nothing of {source.name} would be left; its files are not where this version of the "
            "script expects them."
        )
    write_wheel(target, dist_info, kept)
    return n_left_out


def is_needed_of_sgl_kernel(arch: str) -> Callable[[str], bool]:
    """What sgl_kernel imports on compute capability `arch` ("9.0a"): all but FlashAttention 3.

    sgl_kernel/load_utils.py takes sm90/common_ops on 9.0 and sm100/common_ops everywhere else, also
    where there is no GPU.
    """
    folder = "sm90" if arch.startswith("9.0") else "sm100"

    def is_needed(name: str) -> bool:
        return name.endswith(".py") or name.startswith(f"sgl_kernel/{folder}/common_ops")

    return is_needed


#: Of which nothing is loaded where it is installed: what others would be linked against, examples,
#: and packages' own tests.
UNUSED = (
    re.compile(r".*\.a$"),
    re.compile(r"flashinfer/data/cutlass/(examples|test|tools/library|python)/"),
    re.compile(r"flashinfer/data/cccl/(python|docs|ci|benchmarks|.*/(test|examples?))/"),
    re.compile(r"flashinfer/data/spdlog/(tests|example|bench|scripts)/"),
    re.compile(r"(numpy|transformers|torchvision|sglang/multimodal_gen)(/.*)?/tests?/"),
    re.compile(r".*\.data/(scripts|headers|data)/"),
)


def is_used(name: str) -> bool:
    """Whether a file of a wheel is for whoever runs it."""
    return not any(pattern.match(name) for pattern in UNUSED)


def rule_for(wheel: Path, arch: str) -> Callable[[str], bool]:
    """What is kept of a wheel for GPUs of compute capability `arch`."""
    if wheel.name.startswith("sglang_kernel-"):
        return is_needed_of_sgl_kernel(arch)
    return is_used
