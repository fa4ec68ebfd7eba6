"""A name and a home for a user who has none, before SGLang's libraries ask for them.

Container platforms run a server as a number that no password file knows, without a home or with
`/`, which it may not write. torch asks for the name when it is imported, FlashInfer writes to the
home when it is, and either ends the process with a traceback, long before SGLang loads plugins.
torch loads packages that extend it as its own import ends (through `tiered_kv_entry_points`): the
first moment at which a plugin can run.
"""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from pathlib import Path

TEMPORARY_HOME = "TIERED_KV_TEMPORARY_HOME"
"""Environment variable: a home that was made here, which is no place for what should last."""


def prepare() -> None:
    """Set USER and HOME where they are missing and the command line has `--tiered-kv`.

    Child processes inherit both.
    """
    if "--tiered-kv" not in sys.argv:
        return
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = str(os.getuid())
    if not _has_home():
        try:
            home = _temporary_home()
        except OSError:
            return  # nowhere to write at all: the libraries say so
        os.environ["HOME"] = os.environ[TEMPORARY_HOME] = str(home)


def has_temporary_home() -> bool:
    """Whether the home is one that `prepare` made."""
    return os.environ.get("HOME") == os.environ.get(TEMPORARY_HOME, "")


def _has_home() -> bool:
    """Whether there is a home; `/` is one only if it can be written to.

    Another that is read-only was chosen by somebody, and may hold caches that are wanted.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return False
    return home.is_dir() and (home != Path("/") or os.access(home, os.W_OK))


def _temporary_home() -> Path:
    """This user's alone, and the same at every start, so that kernels stay compiled."""
    folder = Path(tempfile.gettempdir()) / f"tiered_kv_home_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    # Others may write to the directory of temporary files: compiled code is loaded from here.
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="tiered_kv_home_"))
    return folder
