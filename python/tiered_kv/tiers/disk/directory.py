"""The directory of a disk tier: its owner's lock, its format version, its permissions."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tiered_kv.core.errors import DiskStateError, DiskTierError
from tiered_kv.tiers.disk.encryption_header import AES, CHACHA20, EncryptionHeader
from tiered_kv.tiers.disk.faults import remedy
from tiered_kv.tiers.disk.generation import GENERATION_NAME
from tiered_kv.tiers.disk.index import CORRUPT_INDEX_NAME, index_files
from tiered_kv.tiers.disk.io_ops import DIRECTORY_MODE, FILE_MODE
from tiered_kv.tiers.disk.io_path import PROBE_NAME
from tiered_kv.tiers.disk.record import FORMAT_VERSION
from tiered_kv.tiers.disk.segment_files import segment_paths

if TYPE_CHECKING:
    from tiered_kv.tiers.disk.encryption import PageCipher

logger = logging.getLogger(__name__)

LOCK_NAME = "LOCK"
FORMAT_NAME = "FORMAT"
SEGMENTS_NAME = "segments"
_FORMAT_KIND = "tiered-kv-disk"
_SEALED_VERSION = 2
"""Version of an encrypted directory, so that what cannot decrypt refuses it."""
_OUR_FIRST_NAMES = frozenset(
    {LOCK_NAME, FORMAT_NAME, f"{FORMAT_NAME}.new", SEGMENTS_NAME, PROBE_NAME}
)
_INDEX_NAMES = frozenset({path.name for path in index_files(Path())} | {CORRUPT_INDEX_NAME})
_OUR_NAMES = _OUR_FIRST_NAMES | _INDEX_NAMES | {GENERATION_NAME, f"{GENERATION_NAME}.new"}
ANEW = "begin anew with --tiered-kv-clear-disk (the pages are only a cache)"


class OtherFormatError(DiskStateError):
    """The directory is a disk tier's, but cannot be read by this version."""

    def __init__(self, reason: str, *, is_newer: bool = False) -> None:
        super().__init__(f"{reason}: {ANEW}.")
        self.reason = reason
        self.is_newer = is_newer


class OwnerLock:
    """An flock held for as long as the store is open; the kernel drops it when the process dies."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Raises DiskTierError, naming the owner, if another store has the directory open."""
        self.directory = directory
        self.read_only = read_only
        self._path = directory / LOCK_NAME
        flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
        self._fd = os.open(self._path, flags | os.O_CLOEXEC, FILE_MODE)
        try:
            self._acquire()
        except OSError as error:
            owner = read_owner(directory)
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise in_use(directory, owner) from None
        if not read_only:
            # Only tells others who it is: without room for it the lock holds all the same.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, json.dumps(describe_process()).encode() + b"\n", 0)

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # `is_owned` holds the lock for an instant: that is no owner.
            time.sleep(0.05)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_in_place(self) -> bool:
        """False if the file that is locked has been deleted, or replaced by another."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        os.close(self._fd)


def open_error(directory: Path, error: Exception) -> DiskTierError:
    """A DiskStateError, unless the path leads through a file: time does not mend that."""
    what = f"The disk tier in {directory} cannot be opened ({error})"
    with contextlib.suppress(OSError):
        if isinstance(error, NotADirectoryError) or (
            isinstance(error, FileExistsError) and directory.exists()
        ):
            return DiskTierError(f"{what}: name another directory.")
    return DiskStateError(f"{what}: {remedy(error)}.")


def in_use(directory: Path, owner: str) -> DiskTierError:
    return DiskTierError(
        f"The disk tier directory {directory} is in use by {owner}: stop that server or give this "
        "one another directory."
    )


def describe_process() -> dict[str, object]:
    """What a lock file says of its owner."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read_owner(directory: Path, lock_name: str = LOCK_NAME) -> str:
    """Who holds (or held last) the directory, in words."""
    try:
        owner = json.loads((directory / lock_name).read_text())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_owned(directory: Path) -> bool:
    """True while some store has the directory open."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def prepare_directory(directory: Path, *, read_only: bool = False) -> None:
    """Make the directory if needed and check that it may be used; raises DiskTierError or OSError.

    Does not touch a directory that holds anything else.
    """
    if directory.exists() and not directory.is_dir():
        raise DiskTierError(f"{directory} is not a directory: name one for the disk tier.")
    if not read_only:
        directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    if not _says_ours(directory / FORMAT_NAME):
        names = {path.name for path in directory.iterdir()}
        ours = _OUR_NAMES if SEGMENTS_NAME in names else _OUR_FIRST_NAMES
        if foreign := sorted(names - ours):
            raise DiskTierError(
                f"{directory} has no {FORMAT_NAME} file of a disk tier but holds other things "
                f"({foreign[0]}): give the disk tier an empty directory."
            )
    if not read_only:
        make_private(directory)


def _says_ours(path: Path) -> bool:
    """Is this the format file of a disk tier, whatever its version? Damaged ones don't count.

    Raises DiskTierError if it is somebody else's.
    """
    try:
        kind = json.loads(path.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if kind != _FORMAT_KIND:
        raise DiskTierError(
            f"{path.parent} holds something else ({path.name} says {kind!r}): give the disk tier "
            "an empty directory."
        )
    return True


def erase(directory: Path) -> None:
    """Delete what a disk tier keeps in a directory, but for the lock that the caller holds.

    Asks for no key and reads nothing. Raises OSError if something cannot be deleted, after trying
    the rest.
    """
    doomed = [*index_files(directory), directory / CORRUPT_INDEX_NAME]
    with contextlib.suppress(FileNotFoundError):
        doomed += segment_paths(directory / SEGMENTS_NAME)
    # The format goes last: while it is there, the directory is known as ours.
    for name in (GENERATION_NAME, FORMAT_NAME):
        doomed += [directory / f"{name}.new", directory / name]
    error = None
    for path in doomed:
        try:
            path.unlink(missing_ok=True)
        except OSError as raised:
            error = raised
    if error is not None:
        raise error


def erase_unreadable(directory: Path) -> None:
    """Begin anew, with a line in the log, where an older format or damage leaves no choice.

    Raises OtherFormatError for a newer format, whose owner may come back; DiskTierError for what
    is not ours; OSError.
    """
    if not (directory / FORMAT_NAME).exists():
        # Crashed before it got a format, if it is new; the format was lost, if there is more.
        if not any((directory / name).exists() for name in _INDEX_NAMES):
            return
        reason = f"{directory} has lost its {FORMAT_NAME} file"
    else:
        try:
            read_format(directory)
        except OtherFormatError as error:
            if error.is_newer:
                raise
            reason = error.reason
        else:
            return
    logger.warning("Disk tier: %s; its pages are deleted, and it begins anew.", reason)
    erase(directory)


def read_format(directory: Path) -> EncryptionHeader | None:
    """What the directory's pages are encrypted with; None if they are not. Creates nothing.

    Raises DiskTierError if it is no disk tier's directory, OtherFormatError if it is one of another
    format, or damaged.
    """
    path = directory / FORMAT_NAME
    encryption = None
    try:
        found = json.loads(path.read_text())
        kind, version = found["format"], int(found["version"])
        if version == _SEALED_VERSION:
            encryption = _parse_encryption(found["encryption"])
    except FileNotFoundError:
        raise DiskTierError(f"{directory} is not a disk tier directory.") from None
    except (ValueError, KeyError, TypeError):
        raise OtherFormatError(f"{path} is damaged") from None
    if kind != _FORMAT_KIND:
        raise DiskTierError(f"{directory} is not a disk tier directory: {path} says {kind!r}.")
    if version not in (FORMAT_VERSION, _SEALED_VERSION):
        is_newer = version > _SEALED_VERSION
        raise OtherFormatError(
            f"{directory} was written by {'a newer' if is_newer else 'an older'} version (in "
            f"format {version}, this one reads {FORMAT_VERSION} and {_SEALED_VERSION})",
            is_newer=is_newer,
        )
    return encryption


def _parse_encryption(found: dict[str, str]) -> EncryptionHeader:
    cipher, salt, key_check = found["cipher"], found["salt"], found["key_check"]
    if cipher not in (AES, CHACHA20):
        raise ValueError(f"unknown cipher {cipher}")
    return EncryptionHeader(cipher, bytes.fromhex(salt), bytes.fromhex(key_check))


def write_format(directory: Path, encryption: EncryptionHeader | None = None) -> None:
    """Mark the directory as ours, with this version, in one step."""
    contents: dict[str, object] = {"format": _FORMAT_KIND, "version": FORMAT_VERSION}
    if encryption is not None:
        contents["version"] = _SEALED_VERSION
        contents["encryption"] = {
            "cipher": encryption.cipher,
            "salt": encryption.salt.hex(),
            "key_check": encryption.key_check.hex(),
        }
    new = directory / f"{FORMAT_NAME}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        os.write(fd, json.dumps(contents).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    new.replace(directory / FORMAT_NAME)


def open_cipher(
    directory: Path, key: bytes | None, *, read_only: bool = False
) -> PageCipher | None:
    """The cipher of this directory's pages; a directory that has no format yet is given one.

    Raises DiskTierError if the key is wrong or missing, or there is one and the pages are plain.
    """
    if not read_only and not (directory / FORMAT_NAME).exists():
        write_format(directory, None if key is None else _new_header(key))
    header = read_format(directory)
    if header is None:
        if key is not None:
            raise DiskTierError(
                f"The pages in {directory} are not encrypted but a key was given: name another "
                f"directory, or {ANEW}."
            )
        return None
    remedy = f"give the key file they were written with, or {ANEW}"
    if key is None:
        raise DiskTierError(f"The pages in {directory} are encrypted: {remedy}.")
    from tiered_kv.tiers.disk.encryption import cipher_of

    cipher = cipher_of(header, key)
    if cipher is None:
        raise DiskTierError(
            f"The key is not the one that the pages in {directory} were encrypted with: {remedy}."
        )
    return cipher


def _new_header(key: bytes) -> EncryptionHeader:
    from tiered_kv.tiers.disk.encryption import new_header

    return new_header(key)


def segments_directory(directory: Path, *, read_only: bool = False) -> Path:
    path = directory / SEGMENTS_NAME
    if not read_only:
        path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        make_private(path)
    return path


def make_private(directory: Path) -> None:
    """Only its owner may look; one that belongs to somebody else stays as it is."""
    with contextlib.suppress(PermissionError):
        directory.chmod(DIRECTORY_MODE)
