"""Every other plan that can makes the prompt under way go back to the queue.

Policies put prompts back when deadlines are at risk; this does it as often as it goes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

TARGET = "tiered_kv.plugin.queue.order"
REPORT_EVERY = 5


def inject(module: Any) -> None:
    plan_of = module.RequestOrder._plan
    after_result = module.PutBack.after_result
    count = {"plans": 0, "put_back": 0}

    def planned(self: Any, state: Any) -> Any:
        plan = plan_of(self, state)
        if not (state.can_put_back and plan.order):
            return plan
        count["plans"] += 1
        return dataclasses.replace(plan, put_back_unfinished=count["plans"] % 2 == 1)

    def counted(self: Any) -> None:
        was_leaving = self._leaving is not None
        after_result(self)
        if was_leaving and self._leaving is None:
            count["put_back"] += 1
            if count["put_back"] % REPORT_EVERY == 0:
                print(f"put_back_prompts: {count['put_back']} prompts", flush=True)

    module.RequestOrder._plan = planned
    module.PutBack.after_result = counted
