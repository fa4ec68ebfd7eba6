"""What trainers and operators do to a server under load, one thing after the other, many times.

Method: in each round requests are under way while one thing is done: the weights are updated, in
each of SGLang's four ways and in ways that fail; everything is paused, flushed, updated and goes
on; memory is released and resumed; the cache is flushed, the disk is cleared. Meanwhile the disk
may hang or be full, and copies to the device may fail. Guarantee: each answer comes within a bound
and says what it must; every request is answered in full; afterwards a prompt is answered as when
nothing is cached; in the end the disk tier is in use.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.client import Answer, generate
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support import trainer
from support.injection import injected
from support.models import tiny_model_for_two_ranks
from tiered_kv.metrics import names
from tiered_kv.plugin.upstream.installed import installed

pytestmark = [pytest.mark.server, pytest.mark.apart, pytest.mark.slow, pytest.mark.timeout(1800)]

LONG_ROUNDS = int(os.environ.get("TIERED_KV_ADMINISTRATION_ROUNDS", "100"))
#: An update waits for the requests under way, by SGLang's own rule. The machine may be busy.
ANSWER_S = 30.0
N_TOKENS, N_NEW, N_UNDER_WAY = 100, 24, 4
DISK_FAULTS = ("none", "none", "stall", "disk_full")


class Site:
    """A server, its disk, and what can be done to it; each `do_` answers whether all is well."""

    def __init__(self, server: Server, folder: Path, prompts: PromptMaker) -> None:
        self.server, self.folder, self.prompts = server, folder, prompts
        self.models = {name: folder / name for name in ("a", "b")}
        self.weights = {name: trainer.weights_of(model) for name, model in self.models.items()}
        self.group: trainer.ProcessGroup | None = None
        self.dice = random.Random(1)
        self.seconds: dict[str, list[float]] = {}

    # -- the surroundings ---------------------------------------------------------------------

    def disk_is(self, fault: str) -> None:
        (self.folder / "fault").write_text(fault)

    def loads_fail(self, do_they: bool) -> None:
        control = self.folder / "no_loads"
        control.touch() if do_they else control.unlink(missing_ok=True)

    # -- what is done -------------------------------------------------------------------------

    def do_update_from_disk(self) -> bool:
        model = self.dice.choice(list(self.models.values()))
        return trainer.from_disk(self.server, model).status_code == 200

    def do_update_from_nowhere(self) -> bool:
        return trainer.from_disk(self.server, self.folder / "nowhere").status_code == 400

    def do_update_from_another_shape(self) -> bool:
        return trainer.from_disk(self.server, self.folder / "other_shape").status_code == 400

    def do_update_from_tensor(self) -> bool:
        return trainer.from_tensors(self.server, self._part()).status_code == 200

    def do_update_from_tensor_of_another_shape(self) -> bool:
        wrong = {trainer.NAME: torch.zeros(3, 3)}
        return trainer.from_tensors(self.server, wrong).status_code == 400

    def do_update_in_parts(self) -> bool:
        """As trainers do it: pause, flush, parts that flush nothing, go on."""
        ok = self._post("/pause_generation", {"mode": "retract"})
        ok &= self._post("/flush_cache")
        for name in ("a", "b"):
            part = {trainer.NAME: self.weights[name][trainer.NAME]}
            ok &= trainer.from_tensors(self.server, part, flush_cache=False).status_code == 200
        return ok & self._post("/continue_generation", {})

    def do_update_from_distributed(self) -> bool:
        if self.group is None:
            self.group = trainer.ProcessGroup(self.server)
        return self.group.update(self._part()).status_code == 200

    def do_update_from_distributed_without_a_group(self) -> bool:
        body = {"names": [], "dtypes": [], "shapes": [], "group_name": "nobody"}
        answer = self.server.post("/update_weights_from_distributed", body, timeout_s=60)
        return answer.status_code == 400

    def do_update_from_ipc(self) -> bool:
        return trainer.from_ipc(self.server).status_code == 400

    def do_pause_and_update(self) -> bool:
        mode = self.dice.choice(("retract", "in_place"))
        ok = self._post("/pause_generation", {"mode": mode})
        ok &= trainer.from_disk(self.server, self.models["b"]).status_code == 200
        return ok & self._post("/continue_generation", {})

    def do_release_and_resume(self) -> bool:
        tags = {"tags": self.dice.choice((["kv_cache"], ["kv_cache", "weights"], ["weights"]))}
        ok = self._post("/release_memory_occupation", tags)
        return ok & self._post("/resume_memory_occupation", tags)

    def do_release_in_a_pause(self) -> bool:
        ok = self._post("/pause_generation", {"mode": "in_place"})
        ok &= self._post("/release_memory_occupation", {"tags": ["kv_cache"]})
        ok &= self._post("/resume_memory_occupation", {"tags": ["kv_cache"]})
        return ok & self._post("/continue_generation", {})

    def do_resume_what_was_not_released(self) -> bool:
        return self._post("/resume_memory_occupation", {})

    def do_flush(self) -> bool:
        """Refused while requests run, and asked again."""
        answer = self.server.post(f"/flush_cache?timeout={ANSWER_S:.0f}", timeout_s=60)
        return answer.status_code == 200

    def do_clear_the_disk(self) -> bool:
        return self._post("/hicache/storage-backend/clear")

    def _post(self, path: str, body: Any = None) -> bool:
        return self.server.post(path, body, timeout_s=60).status_code == 200

    def _part(self) -> dict[str, torch.Tensor]:
        name = self.dice.choice(("a", "b"))
        return {trainer.NAME: self.weights[name][trainer.NAME].clone()}

    # -- one round ----------------------------------------------------------------------------

    def prompt(self, name: object) -> tuple[int, ...]:
        return self.prompts.tokens(f"administration {name}", N_TOKENS)

    def cold(self, prompt: tuple[int, ...]) -> Answer:
        answer = generate(self.server, prompt, N_NEW, extra_key=uuid.uuid4().hex)
        assert answer.cached_tokens == 0
        return answer

    def round(self, what: str, number: int, pool: ThreadPoolExecutor) -> None:
        self.disk_is(self.dice.choice(DISK_FAULTS))
        self.loads_fail(self.dice.random() < 0.2)
        under_way: list[Future[Answer]] = [
            pool.submit(generate, self.server, self.prompt((number + i) % 7), N_NEW)
            for i in range(N_UNDER_WAY)
        ]
        time.sleep(self.dice.random() * 0.3)
        began = time.monotonic()
        is_well = getattr(self, f"do_{what}")()
        took = time.monotonic() - began
        self.seconds.setdefault(what, []).append(took)
        assert is_well, f"round {number}: {what}{self.server.tail()}"
        assert took < ANSWER_S, f"round {number}: {what} took {took:.1f} s{self.server.tail()}"
        for request in under_way:
            answer = request.result()
            assert (answer.finish_reason, len(answer.output_ids)) == ("length", N_NEW)
        prompt = self.prompt(number % 7)
        warm = [generate(self.server, prompt, N_NEW).output_ids for _ in range(2)]
        assert warm == [self.cold(prompt).output_ids] * 2, f"round {number}: after {what}"
        self.disk_is("none")

    def disk_says(self) -> str:
        """What the server has said of its disk tier, and its metrics now."""
        log = self.server.log_text().splitlines()
        said = [line for line in log if "iered" in line or "isk" in line]
        gauges = [line for line in self.server.get("/metrics").text.splitlines() if "disk" in line]
        return "\n".join([*said[-40:], *gauges])

    def check_that_the_disk_is_back(self) -> None:
        self.loads_fail(False)
        assert self.do_flush()
        prompt = self.prompt(uuid.uuid4())
        first = generate(self.server, prompt, N_NEW)
        deadline = time.monotonic() + 90  # a disk that was full is tried again now and then
        while True:
            wait_for_disk(self.server)
            assert self.do_flush()
            again = generate(self.server, prompt, N_NEW)
            if again.disk:
                break
            assert time.monotonic() < deadline, f"the disk did not come back: {self.disk_says()}"
            time.sleep(1)
        assert again.output_ids == first.output_ids
        time.sleep(1.5)  # gauges are refreshed once a second
        now = scrape(self.server)
        assert now.of(names.DISK_SUSPENDED) == 0
        assert now.of(names.DISK_DEGRADED) == 0


#: Plain SGLang 0.5.23 waits for CUDA when memory is released, also on a CPU (docs/releases.md).
NOT_HERE = (
    set()
    if installed() == "0.5.17" or torch.cuda.is_available()
    else {"release_and_resume", "release_in_a_pause"}
)
WHATS = sorted(
    {name.removeprefix("do_") for name in vars(Site) if name.startswith("do_")} - NOT_HERE
)


@pytest.fixture(scope="module")
def site(
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    model = tiny_model_for_two_ranks(demo_model, folder / "a")
    for name, change in (("b", 0.5), ("other_shape", 0.0)):
        shutil.copytree(model, folder / name)
        weights = trainer.weights_of(model)
        weights[trainer.NAME] = (
            weights[trainer.NAME] * change if change else torch.zeros(3, 3, dtype=torch.float32)
        )
        trainer.write_weights(folder / name, weights)
    page_bytes = 16 * 4 * 2 * 2 * 64 * 4
    args = ["--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 64]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", f"{80 * page_bytes}B"]
    args += ["--tiered-kv-disk-dir", folder / "disk", "--tiered-kv-disk-size", "200MB"]
    watch = ["--enable-metrics", "--tiered-kv-debug-integrity"]
    env = injected(
        "disk_faults,failing_loads",
        TIERED_KV_TEST_FAULT=folder / "fault",
        TIERED_KV_TEST_LOAD_FAULT=folder / "no_loads",
    )
    expected = ("Traceback", "ERROR", "injected", "Error")
    with make_server(
        "administration", *FLOAT32, *args, *watch, model=model, env=env, expected=expected
    ) as server:
        yield Site(server, folder, prompts)


def play(site: Site, n_rounds: int) -> None:
    whats = (WHATS * (n_rounds // len(WHATS) + 1))[:n_rounds]
    site.dice.shuffle(whats)
    with ThreadPoolExecutor(N_UNDER_WAY) as pool:
        for number, what in enumerate(whats):
            site.round(what, number, pool)
            if (number + 1) % len(WHATS) == 0 or number + 1 == n_rounds:
                site.check_that_the_disk_is_back()
    longest = {what: f"{max(seconds):.1f} s" for what, seconds in site.seconds.items()}
    print("longest answers:", longest)
    failed_loads = scrape(site.server).of(names.FAILED_LOADS)
    print(Counter(whats), "failed loads:", failed_loads)


def test_everything_that_can_be_done_to_a_server_under_load(site: Site) -> None:
    play(site, len(WHATS))


@pytest.mark.long
def test_many_rounds_of_it(site: Site) -> None:
    play(site, LONG_ROUNDS)
