"""The disk tier against the raw disk, and its index at a million pages.

Throughput: pages are written to and read from the store, through each path, with each number of I/O
threads, in turn with plain loops of O_DIRECT pwritev/preadv in the same directory ("raw"; I/Os of 1
and 4 MiB). Systems take turns slice by slice and are compared turn by turn, because few disks are
quiet. Blocks that were preallocated but never written cost the file system a journal update at the
first write, for raw writes as for ours: "fresh" and "rewritten" blocks are compared with their
like. The clock stops when the device has the bytes: direct writes are over then, raw ones as ours;
buffered ones end with fdatasync. Flushing the device's own cache between turns is not timed.
"buffered" reads come from the device, too, "buffered, cached" ones from the page cache.

Index: a store with a million pages (segment files are sparse, nothing is read from them) is opened
with a cold page cache; batched lookups are timed.

Example: python benchmark/micro/disk.py --directory /mnt/nvme --quick
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from disk_index import measure_index, print_index
from disk_throughput import MIB, Row, Shape, measure
from tqdm import tqdm

HEADINGS = (
    "page MiB", "threads", "system", "blocks", "write GB/s", "read GB/s", "CPU s/GB write",
    "CPU s/GB read", "write/raw", "read/raw",
)  # fmt: skip
WIDTHS = (8, 7, 17, 9, 10, 9, 14, 13, 9, 8)


def print_headings() -> None:
    print("  ".join(f"{name:>{width}}" for name, width in zip(HEADINGS, WIDTHS, strict=True)))


def print_row(row: Row) -> None:
    numbers = (
        row.write_gb_s, row.read_gb_s, row.write_cpu_s_per_gb, row.read_cpu_s_per_gb,
        row.write_ratio_to_raw, row.read_ratio_to_raw,
    )  # fmt: skip
    values = [f"{row.page_mib:g}", str(row.threads), row.system, row.blocks]
    values += ["-" if number is None else f"{number:.2f}" for number in numbers]
    tqdm.write("  ".join(f"{v:>{width}}" for v, width in zip(values, WIDTHS, strict=True)))


def measure_throughput(options: argparse.Namespace, directory: Path) -> list[Row]:
    rows: list[Row] = []
    shapes = [
        Shape(int(page_mib * MIB), options.slice_mib * MIB, options.slices, threads)
        for page_mib in options.page_mib
        for threads in options.threads
    ]
    print_headings()
    for shape in tqdm(shapes, disable=None, unit=" shapes"):
        new = measure(directory, shape)
        rows += new
        for row in new:
            print_row(row)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, help="where to put the files (default: the temporary directory)"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: half a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--page-mib", type=float, nargs="+", default=[0.25, 1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--slices", type=int, default=9, help="turns of each system (default 9)")
    parser.add_argument(
        "--slice-mib", type=int, default=64, help="data of one turn and one call (default 64)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="openings of the index (default 3)")
    parser.add_argument("--index-pages", type=int, default=1_000_000, help="0 leaves it out")
    parser.add_argument("--lookup-pages", type=int, default=2_000)
    options = parser.parse_args(arguments)
    if options.quick:
        options.page_mib, options.threads = [1], [2, 4]
        options.slices, options.repeats = min(options.slices, 5), 2
        options.index_pages = min(options.index_pages, 200_000)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows: list[Row] = []
    index = None
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="tiered-kv-bench-") as name:
        directory = Path(name)
        if options.slices:
            rows = measure_throughput(options, directory)
        if options.index_pages:
            index = measure_index(
                directory, options.index_pages, options.lookup_pages, options.repeats
            )
            print_index(index)
    if options.json is not None:
        results = {
            "machine": {
                "cpu_count": os.cpu_count(),
                "kernel": platform.release(),
                "load_average": os.getloadavg(),
            },
            "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
            "throughput": [asdict(row) for row in rows],
            "index": None if index is None else asdict(index),
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
