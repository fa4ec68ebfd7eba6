"""Wheels with only the files that are needed."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
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
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            wheel.writestr(info, files[name])
            rows.writerow((name, record_hash(files[name]), len(files[name])))
        rows.writerow((record_name, "", ""))
        wheel.writestr(zipfile.ZipInfo(record_name, EPOCH), record.getvalue())
    partial.replace(path)


def trim_wheel(source: Path, target: Path, is_kept: Callable[[str], bool]) -> int:
    """`source` with only the files that `is_kept` says, and its dist-info; the bytes saved.

    Raises BundleError if nothing beside the dist-info is kept: the package is another than the
    rule was written for.
    """
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        dist_infos = {name.split("/")[0] for name in names if ".dist-info/" in name}
        if len(dist_infos) != 1:
            raise BundleError(f"{source} is no wheel: delete it, and it is downloaded again.")
        (dist_info,) = dist_infos
        kept = {
            name: wheel.read(name)
            for name in names
            if name.startswith(f"{dist_info}/") or is_kept(name)
        }
    kept.pop(f"{dist_info}/RECORD", None)
    if all(name.startswith(f"{dist_info}/") for name in kept):
        raise BundleError(
            f"Nothing of {source.name} would be left; its files are not where this version of the "
            "script expects them."
        )
    write_wheel(target, dist_info, kept)
    return source.stat().st_size - target.stat().st_size


def is_needed_of_sgl_kernel(arch: str) -> Callable[[str], bool]:
    """What sgl_kernel imports on compute capability `arch` ("9.0a"): all but FlashAttention 3.

    sgl_kernel/load_utils.py takes sm90/common_ops on 9.0 and sm100/common_ops everywhere else, also
    where there is no GPU.
    """
    folder = "sm90" if arch.startswith("9.0") else "sm100"

    def is_needed(name: str) -> bool:
        return name.endswith(".py") or name.startswith(f"sgl_kernel/{folder}/common_ops")

    return is_needed
