"""Which packages a bundle holds: `requirements.txt` beside this file, less what the host has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import BundleError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
LINE = re.compile(
    r"(?P<name>[\w.-]+)==(?P<version>[\w.+]+)"
    r"(?:\s*#\s*host: >=(?P<least>[\w.]+)(?:,<(?P<below>[\w.]+))?)?"
)


def normalized(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with: "2.11.0+cu130" is (2, 11, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


@dataclass(frozen=True)
class Requirement:
    """One package of the bundle, and which versions on the host would do as well.

    version: the one that is bundled. least, below: the host's may be at least / must be below
    these; None, None: only the same version will do.
    """

    name: str
    version: str
    least: str | None = None
    below: str | None = None

    def is_met_by(self, version: str) -> bool:
        if self.least is None:
            return version.split("+", maxsplit=1)[0] == self.version
        found = release(version)
        return release(self.least) <= found and (self.below is None or found < release(self.below))


def parse_requirements(text: str) -> list[Requirement]:
    """Lines `NAME==VERSION`, with `# host: >=X[,<Y]` where the host's may differ.

    Raises BundleError for any other line.
    """
    found = []
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise BundleError(f"{line!r} is no requirement; write NAME==VERSION.")
        found.append(Requirement(**match.groupdict()))
    return found


def parse_freeze(text: str) -> dict[str, str]:
    """What `pip freeze` or `pip list --format=freeze` printed on the host: name to version."""
    pairs = re.findall(r"^([\w.-]+)==([\w.+!]+)", text, re.MULTILINE)
    if text.strip() and not pairs:
        raise BundleError(
            "The list of the host's packages has no line NAME==VERSION; make it with "
            "`python3 -m pip list --format=freeze` there."
        )
    return {normalized(name): version for name, version in pairs}


def wanted(requirements: Iterable[Requirement], host: Mapping[str, str]) -> list[Requirement]:
    """The requirements that the host does not meet."""
    return [
        requirement
        for requirement in requirements
        if (version := host.get(normalized(requirement.name))) is None
        or not requirement.is_met_by(version)
    ]
