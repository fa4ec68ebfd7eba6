"""Hooks that are attached elsewhere in SGLang 0.5.17 than in other releases, or nowhere."""

from __future__ import annotations

#: Target in `hooks/` -> the target here, and our function for it; None: there is none.
ELSEWHERE: dict[str, tuple[str, str] | None] = {}
#: Hooks that this release alone needs: (target, kind, our function, why).
MORE: tuple[tuple[str, str, str, str], ...] = ()
