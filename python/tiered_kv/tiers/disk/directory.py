"""The directory of a disk tier: its owner's lock, its format version, its permissions."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.io_ops import DIRECTORY_MODE, FILE_MODE
from tiered_kv.tiers.disk.record import FORMAT_VERSION

if TYPE_CHECKING:
    from tiered_kv.tiers.disk.encryption import PageCipher

LOCK_NAME = "LOCK"
FORMAT_NAME = "FORMAT"
SEGMENTS_NAME = "segments"
_FORMAT_KIND = "tiered-kv-disk"
_SEALED_VERSION = 2
"""Version of an encrypted directory, so that what cannot decrypt refuses it."""
AES = "AES-256-GCM"
CHACHA20 = "ChaCha20-Poly1305"
_KNOWN_NAMES = frozenset({LOCK_NAME, FORMAT_NAME, f"{FORMAT_NAME}.new", SEGMENTS_NAME})


class EncryptionHeader(NamedTuple):
    """What an encrypted directory says about itself, in the clear."""

    cipher: str
    """AES or CHACHA20."""
    salt: bytes
    key_check: bytes


class OwnerLock:
    """An flock held for as long as the store is open; the kernel drops it when the process dies."""

    def __init__(self, directory: Path) -> None:
        """Raises DiskTierError, naming the owner, if another store has the directory open."""
        self._fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            self._acquire()
        except OSError as error:
            owner = read_owner(directory)
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise DiskTierError(
                f"The disk tier directory {directory} is in use by {owner}: stop that server or "
                "give this one another directory."
            ) from None
        contents = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(contents).encode() + b"\n", 0)

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # `is_owned` holds the lock for an instant: that is no owner.
            time.sleep(0.05)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        os.close(self._fd)


def read_owner(directory: Path) -> str:
    """Who holds (or held last) the directory, in words."""
    try:
        owner = json.loads((directory / LOCK_NAME).read_text())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_owned(directory: Path) -> bool:
    """True while some store has the directory open."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def prepare_directory(directory: Path) -> None:
    """Make the directory if needed and check that it may be used; raises DiskTierError or OSError.

    Does not touch a directory that holds anything else.
    """
    if directory.exists() and not directory.is_dir():
        raise DiskTierError(f"{directory} is not a directory: name one for the disk tier.")
    directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    if not (directory / FORMAT_NAME).exists():
        foreign = sorted(p.name for p in directory.iterdir() if p.name not in _KNOWN_NAMES)
        if foreign:
            raise DiskTierError(
                f"{directory} has no {FORMAT_NAME} file but holds other things ({foreign[0]}): "
                "give the disk tier an empty directory."
            )
    directory.chmod(DIRECTORY_MODE)


def read_format(directory: Path) -> EncryptionHeader | None:
    """What the directory's pages are encrypted with; None if they are not. Creates nothing.

    Raises DiskTierError if it is no disk tier's directory, or one of another format.
    """
    path = directory / FORMAT_NAME
    remedy = "delete it or name another directory, the pages in it are only a cache"
    try:
        found = json.loads(path.read_text())
        kind, version = found["format"], found["version"]
        encryption = _parse_encryption(found["encryption"]) if version == _SEALED_VERSION else None
    except FileNotFoundError:
        raise DiskTierError(f"{directory} is not a disk tier directory.") from None
    except (ValueError, KeyError, TypeError):
        raise DiskTierError(f"{path} is damaged: {remedy}.") from None
    if kind != _FORMAT_KIND or version not in (FORMAT_VERSION, _SEALED_VERSION):
        raise DiskTierError(
            f"{directory} was written in format {kind} version {version}, this is "
            f"{_FORMAT_KIND} version {FORMAT_VERSION} or {_SEALED_VERSION}: {remedy}."
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


def open_cipher(directory: Path, key: bytes | None) -> PageCipher | None:
    """The cipher of this directory's pages; a directory that has no format yet is given one.

    Raises DiskTierError if the key is wrong or missing, or there is one and the pages are plain.
    """
    if not (directory / FORMAT_NAME).exists():
        write_format(directory, None if key is None else _new_header(key))
    header = read_format(directory)
    remedy = "name another directory or delete this one, the pages in it are only a cache"
    if header is None:
        if key is not None:
            raise DiskTierError(
                f"The pages in {directory} are not encrypted but a key was given: {remedy}."
            )
        return None
    if key is None:
        raise DiskTierError(
            f"The pages in {directory} are encrypted: give the key file they were written with, or "
            f"{remedy}."
        )
    from tiered_kv.tiers.disk.encryption import cipher_of

    cipher = cipher_of(header, key)
    if cipher is None:
        raise DiskTierError(
            f"The key is not the one that the pages in {directory} were encrypted with: give that "
            f"one, or {remedy}."
        )
    return cipher


def _new_header(key: bytes) -> EncryptionHeader:
    from tiered_kv.tiers.disk.encryption import new_header

    return new_header(key)


def segments_directory(directory: Path) -> Path:
    path = directory / SEGMENTS_NAME
    path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    path.chmod(DIRECTORY_MODE)
    return path
