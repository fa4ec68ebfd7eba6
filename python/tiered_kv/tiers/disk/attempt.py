"""Writes that their caller can leave when the disk hangs."""

from __future__ import annotations


class AbandonedError(Exception):
    """The caller of a write has gone, and may use its buffers for other things."""


class Attempt:
    """One call to write pages, which its caller may abandon at any instant.

    From then on the buffers hold anything: what is checksummed after that must not be written, let
    alone acknowledged. What the kernel was given before goes on; if the buffers change under it,
    the checksum does not fit, which makes it a miss, not a wrong page.
    """

    def __init__(self) -> None:
        self.is_abandoned = False

    def abandon(self) -> None:
        self.is_abandoned = True

    def check(self) -> None:
        """Raises AbandonedError."""
        if self.is_abandoned:
            raise AbandonedError
