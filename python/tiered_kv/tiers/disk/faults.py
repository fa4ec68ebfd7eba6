"""What an error says: is it the page's, the file's, the process's, or the state of the disk?"""

from __future__ import annotations

import enum
import errno
import sqlite3


class Blame(enum.Enum):
    """What an operating error is to be blamed on, and so what it may cost."""

    PROCESS = enum.auto()
    """Out of descriptors or memory, or interrupted: it says nothing about what is stored."""
    HANDLE = enum.auto()
    """The open file leads nowhere any more: open it anew by its name."""
    MEDIUM = enum.auto()
    """This place cannot be read or written."""
    STATE = enum.auto()
    """The file system as a whole: full, read-only, out of reach."""


_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
_HANDLE = frozenset({errno.ESTALE, errno.ENOENT})
# EUCLEAN and EBADMSG are what ext4, XFS and btrfs say of blocks that fail their checksums.
_MEDIUM = frozenset(
    {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO}
)

# Primary result codes of SQLite: the file is broken, and what the machine's state causes.
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_STATE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_AUTH,
    }
)
# Extended ones, of SQLITE_IOERR, that speak of blocks of the file.
_UNREADABLE = frozenset(
    {
        sqlite3.SQLITE_IOERR_READ,
        sqlite3.SQLITE_IOERR_SHORT_READ,
        sqlite3.SQLITE_IOERR_CORRUPTFS,
    }
)


def blame_of(error: OSError) -> Blame:
    if error.errno in _PROCESS:
        return Blame.PROCESS
    if error.errno in _HANDLE:
        return Blame.HANDLE
    return Blame.MEDIUM if error.errno in _MEDIUM else Blame.STATE


def is_damage(error: Exception, *, at_open: bool = False) -> bool:
    """Does this error of the index mean that its file is broken, rather than the disk's state?

    at_open: nobody has found the index well yet, so that whatever is odd in it counts as damage.
    """
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # At open flipped bytes in a row may come back as values of another type or range; later
        # an earlier attempt to write the index anew may have left the connection closed.
        return at_open or isinstance(error, sqlite3.ProgrammingError)
    if code in _UNREADABLE:
        return True
    return code & 0xFF not in _STATE if at_open else code & 0xFF in _DAMAGE


def remedy(error: Exception) -> str:
    """What a user can do about the state of a disk, to end a sentence with."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        number = _AS_ERRNO.get(code, _AS_ERRNO.get(code & 0xFF))
    else:
        number = getattr(error, "errno", None)
    return _REMEDIES.get(number, "look into the kernel's log, the disk may be failing")


_AS_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    # The file beside the index that SQLite shares with other processes cannot grow.
    sqlite3.SQLITE_IOERR_SHMSIZE: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
}
_WRITABLE = "make the directory writable or name another"
_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOENT: _WRITABLE,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files (fs.file-max)",
    errno.ENOMEM: "free some memory",
}
