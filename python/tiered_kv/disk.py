"""Looks after a disk tier's directory: `python -m tiered_kv.disk inspect|verify|gc|clear DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from tiered_kv.core.errors import TieredKVError
from tiered_kv.core.units import format_bytes, parse_bytes
from tiered_kv.tiers.disk.directory import FORMAT_NAME, read_format
from tiered_kv.tiers.disk.maintenance import (
    DirectoryReport,
    clear_directory,
    inspect_directory,
    open_for_maintenance,
    verify,
)
from tiered_kv.tiers.disk.shards import (
    bytes_below,
    delete_other_layouts,
    kept_from_servers,
    list_shards,
    shards_in_use,
)
from tiered_kv.tiers.disk.store import DiskStore

EXIT_BAD_PAGES = 1
EXIT_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 fine, 1 bad pages found, 2 could not run)."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except TieredKVError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_ERROR
    except OSError as error:
        sys.stderr.write(f"{_cannot(options, options.directory, error)}\n")
        return EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    return status


def _cannot(options: argparse.Namespace, directory: Path, error: OSError) -> str:
    return f"Cannot {options.command} {directory}: {error}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.disk",
        description="Look after the directory of a disk tier: the one that is given to the server, "
        "or one of the shards in it. All but `inspect` need it for themselves: stop the server "
        "first.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _add_command(commands, "inspect", _inspect, "show what is stored, per model")
    inspect.description = "Show what is stored, per model. Works beside a running server."

    check = _add_command(commands, "verify", _verify, "read every page back and check it")
    check.add_argument(
        "--repair",
        action="store_true",
        help="drop pages that cannot be read back (a server would do so when it meets them)",
    )

    gc = _add_command(commands, "gc", _gc, "give unused space back to the file system")
    gc.add_argument(
        "--capacity",
        type=_size,
        metavar="SIZE",
        help="also shrink to this many bytes (such as 20GB), giving up the least recently used "
        "pages; a server started later may grow again to its own limit",
    )

    clear = _add_command(commands, "clear", _clear, "delete every page")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: object,
    help_text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text)
    command.add_argument(
        "directory", type=Path, metavar="DIR", help="the server's --tiered-kv-disk-dir, or a shard"
    )
    command.set_defaults(run=run)
    if run in (_verify, _gc):
        command.add_argument(
            "--key-file",
            type=Path,
            metavar="FILE",
            help="the key of an encrypted directory, the server's --tiered-kv-disk-key-file",
        )
    return command


def _open(
    options: argparse.Namespace,
    shard: Path,
    capacity_bytes: int | None = None,
    *,
    read_only: bool = False,
) -> DiskStore:
    key = None
    if options.key_file is not None:
        from tiered_kv.tiers.disk.encryption import read_key_file

        key = read_key_file(options.key_file)
    return open_for_maintenance(shard, capacity_bytes, key, read_only=read_only)


def _shards(directory: Path) -> list[Path]:
    """The directory itself, if it is a shard, or those in it. Raises DiskTierError, OSError."""
    shards = [shard.path for shard in list_shards(directory)] if directory.is_dir() else []
    if shards and not (directory / FORMAT_NAME).exists():
        return shards
    read_format(directory)
    return [directory]


def _orphans(directory: Path) -> set[Path]:
    """Shards that no server will read any more. Raises OSError."""
    n_shards = shards_in_use(directory)
    if n_shards is None:
        return set()
    return {shard.path for shard in list_shards(directory) if shard.n_shards != n_shards}


def _for_each_shard(options: argparse.Namespace, run: Callable[[Path], int]) -> int:
    """Run for every shard, those after one that fails included; returns the worst status."""
    status = 0
    for shard in _shards(options.directory):
        try:
            status = max(status, run(shard))
        except TieredKVError as error:
            sys.stderr.write(f"{error}\n")
            status = EXIT_ERROR
        except OSError as error:
            sys.stderr.write(f"{_cannot(options, shard, error)}\n")
            status = EXIT_ERROR
    return status


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except TieredKVError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _inspect(options: argparse.Namespace) -> int:
    orphans = _orphans(options.directory)

    def inspect(shard: Path) -> int:
        report = format_report(shard, inspect_directory(shard))
        if shard in orphans:
            report += (
                "left by a server with another --tp-size or --dp-size: the next start and `gc` "
                "delete it\n"
            )
        sys.stdout.write(report)
        return 0

    return _for_each_shard(options, inspect)


def _verify(options: argparse.Namespace) -> int:
    with kept_from_servers(options.directory):
        return _for_each_shard(options, lambda shard: _verify_shard(options, shard))


def _verify_shard(options: argparse.Namespace, shard: Path) -> int:
    with _open(options, shard, read_only=not options.repair) as store:
        bad = 0
        description = f"verify {shard.name}"
        with tqdm(total=store.stats().pages, unit=" pages", desc=description, disable=None) as bar:

            def show(n_checked: int, n_bad: int) -> None:
                nonlocal bad
                bad += n_bad
                bar.update(n_checked)
                bar.set_postfix(bad=bad)

            report = verify(store, repair=options.repair, on_progress=show)
    outcome = f"{shard}: {report.pages} pages checked, {report.bad} bad"
    if report.dropped:
        outcome += f", {report.dropped} dropped"
    elif report.bad:
        outcome += " (--repair drops them)"
    sys.stdout.write(outcome + ".\n")
    return EXIT_BAD_PAGES if report.bad > report.dropped else 0


def _gc(options: argparse.Namespace) -> int:
    directory: Path = options.directory
    with kept_from_servers(directory):
        n_shards = len(_shards(directory))
        before = bytes_below(directory)
        if (n_in_use := shards_in_use(directory)) is not None:
            delete_other_layouts(directory, n_in_use)
            n_shards = n_in_use
        capacity_bytes = None if options.capacity is None else options.capacity // n_shards

        def tidy(shard: Path) -> int:
            with _open(options, shard, capacity_bytes) as store:
                store.collect_garbage()
            return 0

        status = _for_each_shard(options, tidy)
    after = bytes_below(directory)
    sys.stdout.write(
        f"{format_bytes(max(before - after, 0))} given back, {format_bytes(after)} on disk.\n"
    )
    return status


def _clear(options: argparse.Namespace) -> int:
    with kept_from_servers(options.directory):
        shards = _shards(options.directory)
        n_bytes = sum(map(bytes_below, shards))
        if not options.yes:
            question = f"Delete all pages ({format_bytes(n_bytes)}) in {options.directory}? [y/N] "
            if not _is_confirmed(question):
                sys.stdout.write("Nothing was deleted.\n")
                return 0

        def clear(shard: Path) -> int:
            clear_directory(shard)
            return 0

        status = _for_each_shard(options, clear)
    left = sum(map(bytes_below, shards))
    sys.stdout.write(f"{format_bytes(max(n_bytes - left, 0))} deleted.\n")
    return status


def _is_confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def format_report(directory: Path, report: DirectoryReport) -> str:
    """The report as a table for people."""
    rows = [("namespace", "pages", "page size", "bytes", "description")]
    for namespace in report.namespaces:
        rows.append(
            (
                namespace.namespace_id.hex()[:16],
                f"{namespace.pages:,}",
                format_bytes(namespace.page_bytes),
                format_bytes(namespace.pages * namespace.page_bytes),
                namespace.description or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    used, capacity = format_bytes(report.bytes_on_disk), format_bytes(report.capacity_bytes)
    lines = [
        f"directory  {directory}",
        f"in use by  {report.owner or 'nobody'}",
        f"on disk    {used} of {capacity} in {report.segments} segments",
        f"encrypted  {report.cipher or 'no'}",
        "",
    ]
    for name, pages, page_size, n_bytes, description in rows:
        lines.append(
            f"{name:<{widths[0]}}  {pages:>{widths[1]}}  {page_size:>{widths[2]}}  "
            f"{n_bytes:>{widths[3]}}  {description}"
        )
    if not report.namespaces:
        lines.append("(nothing stored yet)")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
