"""A tar archive as parts of a given size, with a list of checksums that `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from bundle.errors import BundleError
from bundle.install import CHECKSUMS_NAME

PART_NAME = "payload.tar.{:03d}"
PART_BYTES_MIN = 64 << 10


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartWriter(io.RawIOBase):
    """A file object whose bytes go to `folder/payload.tar.NNN`, `part_bytes` in each.

    digests: name and SHA-256 of every part, the last one after `close`.
    """

    def __init__(self, folder: Path, part_bytes: int) -> None:
        if part_bytes < PART_BYTES_MIN:
            raise BundleError(
                f"Parts of {part_bytes} bytes are too small; give --part-size at least "
                f"{PART_BYTES_MIN >> 10}KiB."
            )
        self._folder = folder
        self._part_bytes = part_bytes
        self._file: BinaryIO | None = None
        self._room = 0
        self._hash = hashlib.sha256()
        self.digests: list[tuple[str, str]] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            if self._room == 0:
                self._next_part()
            piece = view[written : written + self._room]
            assert self._file is not None
            self._file.write(piece)
            self._hash.update(piece)
            self._room -= len(piece)
            written += len(piece)
        return written

    def close(self) -> None:
        self._end_part()
        super().close()

    def _next_part(self) -> None:
        self._end_part()
        name = PART_NAME.format(len(self.digests))
        self._file = (self._folder / name).open("wb")
        self._hash = hashlib.sha256()
        self._room = self._part_bytes

    def _end_part(self) -> None:
        if self._file is None:
            return
        self.digests.append((Path(self._file.name).name, self._hash.hexdigest()))
        self._file.close()
        self._file = None


def write_parts(
    entries: Iterable[tuple[str, Path]],
    folder: Path,
    part_bytes: int,
    progress: Callable[[str, int], object] = lambda _name, _n_bytes: None,
) -> list[tuple[str, str]]:
    """Files as parts of one tar archive: (name in the archive, path); returns part and SHA-256.

    Owners and times are left out, so that equal files give equal parts. `progress` hears of each
    file written, with its bytes. Raises BundleError for parts that are too small.
    """
    for old in folder.glob(PART_NAME.replace("{:03d}", "*")):
        old.unlink()
    writer = PartWriter(folder, part_bytes)
    with writer, tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name, path in entries:
            info = archive.gettarinfo(path, name)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = 0
            with path.open("rb") as file:
                archive.addfile(info, file)
            progress(name, info.size)
    return writer.digests


def write_checksums(digests: Iterable[tuple[str, str]], folder: Path) -> Path:
    """`SHA256SUMS` for (file name, SHA-256) pairs."""
    path = folder / CHECKSUMS_NAME
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in digests))
    return path
