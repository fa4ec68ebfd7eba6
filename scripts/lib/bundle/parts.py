"""Two compressed archives as parts of a given size, with checksums that `sha256sum -c` reads.

The first is whole in itself, in one part; the other one is cut into as few parts as will do, all
of a size.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bundle.errors import BundleError
from bundle.install import CHECKSUMS_NAME, FIRST_NAME, REST_NAME

PART_BYTES_MIN = 64 << 10
#: Files that resemble each other lie further apart than the usual eight mebibytes.
DICTIONARY_BYTES = 64 << 20


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_archive(
    entries: Iterable[tuple[str, Path]],
    path: Path,
    progress: Callable[[str, int], object] = lambda _name, _n_bytes: None,
) -> None:
    """A compressed archive of (name in it, path).

    Owners and times are left out, so that equal files give equal bytes. `progress` hears of each
    file written, with its bytes.
    """
    # Quick: the parts are as many by the preset 6.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 3, "dict_size": DICTIONARY_BYTES}]
    with (
        lzma.open(path, "wb", filters=filters) as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, source in entries:
            info = archive.gettarinfo(source, name)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = 0
            with source.open("rb") as contents:
                archive.addfile(info, contents)
            progress(name, info.size)


def write_parts(
    first: Iterable[tuple[str, Path]],
    rest: Iterable[tuple[str, Path]],
    folder: Path,
    part_bytes: int,
    progress: Callable[[str, int], object] = lambda _name, _n_bytes: None,
) -> list[tuple[str, str]]:
    """Both archives of (name in the archive, path); returns part and SHA-256, the first one first.

    Raises BundleError for parts that are too small, and for a first one that does not fit.
    """
    if part_bytes < PART_BYTES_MIN:
        raise BundleError(
            f"Parts of {part_bytes} bytes are too small; give --part-size at least "
            f"{PART_BYTES_MIN >> 10}KiB."
        )
    for old in (*folder.glob(f"{REST_NAME}*"), folder / FIRST_NAME):
        old.unlink(missing_ok=True)
    path = folder / FIRST_NAME
    write_archive(first, path, progress)
    if path.stat().st_size > part_bytes:
        raise BundleError(
            f"The first part takes {path.stat().st_size} bytes, and parts have {part_bytes}; give "
            "a larger --part-size."
        )
    whole = folder / f"{REST_NAME}partial"
    write_archive(rest, whole, progress)
    names = [FIRST_NAME, *cut(whole, folder, part_bytes)]
    whole.unlink()
    return [(name, sha256_of(folder / name)) for name in names]


def cut(whole: Path, folder: Path, part_bytes: int) -> list[str]:
    """The names of the pieces of a file, as few as will do, about as long as each other."""
    n_bytes = whole.stat().st_size
    n_parts = -(-n_bytes // part_bytes)
    size = -(-n_bytes // n_parts)
    names = []
    with whole.open("rb") as file:
        for number in range(n_parts):
            names.append(f"{REST_NAME}{number:03d}")
            (folder / names[-1]).write_bytes(file.read(size))
    return names


def write_checksums(digests: Iterable[tuple[str, str]], folder: Path) -> Path:
    """`SHA256SUMS` for (file name, SHA-256) pairs."""
    path = folder / CHECKSUMS_NAME
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in digests))
    return path
