"""What every cold store must do, whatever it is made of.

Guarantee: what comes back is what was stored under that name in that namespace, whole, or it is a
miss; leading pages count; nothing raises because of what is outside the process; whatever failed is
tried again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support_tiers.shared_blobs import SharedBlobs, lies
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore, StoreTraits
from tiered_kv.tiers.shared import object_store
from tiered_kv.tiers.shared.blobs import Blobs
from tiered_kv.tiers.shared.envelope import HEADER_BYTES, Envelope, StoreSecrets
from tiered_kv.tiers.shared.link import StoreLink
from tiered_kv.tiers.shared.object_store import ObjectStore

pytestmark = pytest.mark.timeout(60)

PAGE = PageFormat.of_buffers(16, (0, 0, 1, 1), (24, 24, 24, 24))
NAMESPACE, OTHER = b"n" * 32, b"m" * 32

MakeStore = Callable[[bytes], PageStore]


def on_disk(path: Path, key: bytes | None = None) -> tuple[Any, MakeStore]:
    store = DiskStore.open(path, capacity_bytes=64 << 20, key=key)
    return store.close, lambda name: LocalStore(store.namespace(name, PAGE.page_bytes), PAGE)


SECRETS = {
    "blobs": StoreSecrets(),
    "blobs with a key": StoreSecrets(b"c" * 32),
    "encrypted blobs": StoreSecrets(b"c" * 32, encrypts=True),
}


ENGINES = (
    "valkey",
    "hicache_file",
    pytest.param("mooncake", marks=pytest.mark.long),
    pytest.param("hicache_mooncake", marks=pytest.mark.long),
)


@pytest.fixture(params=["memory", "disk", "encrypted disk", *SECRETS, *ENGINES])
def make_store(
    request: pytest.FixtureRequest, tmp_path: Path, engine: Callable[[str], Blobs]
) -> Iterator[MakeStore]:
    close: Callable[[], Any] = lambda: None  # noqa: E731
    if request.param == "memory":
        memory = InMemoryStore()
        yield lambda name: LocalStore(memory.namespace(name, PAGE.page_bytes), PAGE)
    elif "disk" in request.param:
        close, make = on_disk(tmp_path, b"k" * 32 if "encrypted" in request.param else None)
        yield make
    else:
        blobs = SharedBlobs() if request.param in SECRETS else engine(request.param)
        traits = StoreTraits(Tier.STORE, PAGE, knows_locally=False, is_shared=True)
        secrets = SECRETS.get(request.param, SECRETS["encrypted blobs"])
        yield lambda name: ObjectStore(StoreLink(blobs), name, traits, secrets)
    close()


@pytest.fixture
def store(make_store: MakeStore) -> PageStore:
    return make_store(NAMESPACE)


def hashes(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in numbers]


def page(number: int, tag: int = 0) -> bytes:
    return bytes((number * 7 + tag + i) % 251 for i in range(PAGE.page_bytes))


def put(store: PageStore, *numbers: int, tag: int = 0) -> int:
    buffers = [memoryview(bytearray(page(number, tag))) for number in numbers]
    return store.put(hashes(*numbers), buffers)


def get(store: PageStore, *numbers: int, slot_bytes: int = PAGE.page_bytes) -> list[bytes]:
    buffers = [memoryview(bytearray(slot_bytes)) for _ in numbers]
    n_read = store.get(hashes(*numbers), buffers)
    return [bytes(buffer[: PAGE.page_bytes]) for buffer in buffers[:n_read]]


def test_what_was_put_is_there_and_comes_back(store: PageStore) -> None:
    assert put(store, 1, 2, 3) == 3
    assert store.lookup(hashes(1, 2, 3)) == 3
    assert get(store, 1, 2, 3) == [page(1), page(2), page(3)]
    assert get(store, 3, 1) == [page(3), page(1)]
    assert get(store, 2, slot_bytes=PAGE.slot_bytes) == [page(2)]


def test_it_says_what_it_knows(store: PageStore) -> None:
    put(store, 1, 2)
    known = store.known(hashes(1, 2, 3)), store.known(hashes(1)), store.known(hashes(9))
    assert known == ((2, 1, 0) if store.traits.knows_locally else (None, None, None))


def test_what_is_not_there_ends_the_prefix(store: PageStore) -> None:
    assert store.lookup(hashes(1)) == 0
    assert get(store, 1) == []
    put(store, 1, 2, 4)
    assert store.lookup(hashes(1, 2, 3, 4)) == 2
    assert get(store, 1, 2, 3, 4) == [page(1), page(2)]
    assert get(store, 3, 4) == []


def test_what_is_there_need_not_be_put_again(store: PageStore) -> None:
    put(store, 2)
    assert put(store, 1, 2, 3) == 3
    assert put(store, 1, 2, 3) == 3
    assert get(store, 1, 2, 3) == [page(1), page(2), page(3)]


def test_namespaces_are_apart(make_store: MakeStore) -> None:
    mine, others = make_store(NAMESPACE), make_store(OTHER)
    put(mine, 1, tag=5)
    assert others.lookup(hashes(1)) == 0
    put(others, 1, tag=9)
    assert get(mine, 1) == [page(1, 5)]
    assert get(others, 1) == [page(1, 9)]


def test_nothing_is_asked_and_nothing_comes(store: PageStore) -> None:
    assert store.lookup([]) == 0
    assert store.get([], []) == 0
    assert store.put([], []) == 0
    store.touch([])


def test_touching_and_dropping(store: PageStore) -> None:
    put(store, 1, 2)
    store.touch(hashes(1, 2, 77))
    # A store that is asked says what has gone; whether it was ever there it cannot say.
    assert store.drain_dropped() == ([] if store.traits.knows_locally else hashes(77))
    assert store.drain_dropped() == []


def test_what_is_used_all_the_time_is_touched_now_and_then(
    blobs: SharedBlobs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    touch = blobs.exist
    blobs.touch = lambda keys: asked.append(len(keys)) or touch(keys)  # type: ignore[func-returns-value, method-assign, assignment]
    store = shared(blobs, clock)
    put(store, 1, 2)
    store.touch(hashes(1, 2, 77))
    store.touch(hashes(1, 2, 77))
    assert asked == [3, 1], "only what was not there is asked for at once again"
    blobs.asks.error = ConnectionError()
    store.touch(hashes(77))
    blobs.asks.error = None
    clock.now_s += 1.0
    store.touch(hashes(1, 2))
    assert asked[-1] == 2, "after a failure nothing is taken for granted"
    monkeypatch.setattr(object_store, "TOUCH_AGAIN_S", 0.0)
    store.touch(hashes(1, 2))
    assert asked[-1] == 2


def test_many_at_once_from_many_threads(store: PageStore) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        for n in range(30):
            first = (seed * 13 + n * 7) % 40
            numbers = range(first, first + 6)
            put(store, *numbers)
            for number, found in zip(numbers, get(store, *numbers), strict=False):
                if found != page(number):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.lookup(hashes(*range(40))) == 40


# -- a store that is not to be believed


@pytest.fixture
def blobs() -> SharedBlobs:
    return SharedBlobs()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shared(
    blobs: SharedBlobs,
    clock: Clock,
    name: bytes = NAMESPACE,
    secrets: StoreSecrets = SECRETS["blobs"],
) -> ObjectStore:
    traits = StoreTraits(Tier.STORE, PAGE, knows_locally=False, is_shared=True)
    return ObjectStore(StoreLink(blobs, now=clock), name, traits, secrets)


@pytest.mark.parametrize("secrets", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("what", [name for name, _ in lies(SharedBlobs())])
def test_a_lie_is_a_miss_and_is_replaced(
    blobs: SharedBlobs, clock: Clock, what: str, secrets: StoreSecrets
) -> None:
    store = shared(blobs, clock, secrets=secrets)
    put(store, 1, 2, 3)
    honest = dict(blobs.blobs)
    lie = dict(lies(blobs))[what]
    (second,) = store._keys(hashes(2))
    blobs.lie = lambda key, blob: lie(key, blob) if key == second else blob
    assert get(store, 1, 2, 3) == [page(1)]
    blobs.lie = None
    if what != "forgotten":
        blobs.blobs[second] = b"something else"
        assert put(store, 2) == 1
    if not secrets.encrypts:
        assert blobs.blobs == honest
    assert get(store, 1, 2, 3) == [page(1), page(2), page(3)]


@pytest.mark.parametrize("encrypts", [False, True])
def test_blobs_of_others_are_theirs(blobs: SharedBlobs, clock: Clock, encrypts: bool) -> None:
    one, two = StoreSecrets(b"1" * 32, encrypts), StoreSecrets(b"2" * 32, encrypts)
    mine = shared(blobs, clock, secrets=one)
    put(mine, 1)
    others = [(NAMESPACE, two), (OTHER, one), (NAMESPACE, StoreSecrets(b"1" * 32, not encrypts))]
    for name, secrets in others:
        other = shared(blobs, clock, name, secrets)
        # Even where somebody gives it the name that is asked for.
        (theirs,), (ours,) = other._keys(hashes(1)), mine._keys(hashes(1))
        assert theirs != ours
        assert other.lookup(hashes(1)) == 0
        before = dict(blobs.blobs)
        blobs.blobs[theirs] = blobs.blobs[ours]
        assert get(other, 1) == []
        blobs.blobs = before
    assert get(mine, 1) == [page(1)]


def test_with_a_key_a_blob_tells_nothing_and_none_can_be_made(
    blobs: SharedBlobs, clock: Clock
) -> None:
    """Whoever reaches the store knows the namespace and guesses a prompt."""
    store = shared(blobs, clock, secrets=SECRETS["blobs with a key"])
    put(store, 1)
    ((key, blob),) = blobs.blobs.items()
    guess = hashes(1)[0]
    stranger = shared(blobs, clock)
    assert stranger.lookup([guess]) == 0
    assert guess not in blob
    assert NAMESPACE not in blob
    forged = Envelope(StoreSecrets(), NAMESPACE, PAGE.page_bytes)
    header, payload = memoryview(bytearray(HEADER_BYTES)), memoryview(page(1, tag=66))
    forged.seal(bytes.fromhex(key), payload, header, None)
    blobs.blobs[key] = bytes(header) + bytes(payload)
    assert get(store, 1) == []


def test_encrypted_pages_are_not_readable_in_the_store(blobs: SharedBlobs, clock: Clock) -> None:
    put(shared(blobs, clock, secrets=SECRETS["blobs with a key"]), 1)
    assert any(page(1) in blob for blob in blobs.blobs.values())
    blobs.forget()
    put(shared(blobs, clock, secrets=SECRETS["encrypted blobs"]), 1)
    assert blobs.blobs
    assert not any(page(1)[:16] in blob for blob in blobs.blobs.values())


def test_what_is_refused_ends_what_is_stored(blobs: SharedBlobs, clock: Clock) -> None:
    store = shared(blobs, clock)
    (second,) = store._keys(hashes(2))
    blobs.takes = lambda key: key != second
    assert put(store, 1, 2, 3) == 1
    assert store.lookup(hashes(1, 2, 3)) == 1


def test_an_error_is_a_miss_and_is_not_tried_all_the_time(
    blobs: SharedBlobs, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = shared(blobs, clock)
    put(store, 1)
    for faults in (blobs.reads, blobs.asks):
        faults.error = ConnectionError("no route")
    for _ in range(5):
        assert get(store, 1) == []
        assert store.lookup(hashes(1)) == 0
    assert store.is_degraded
    assert len(caplog.messages) == 1
    assert "Store double is not read because of an error (no route)" in caplog.text
    blobs.reads.error = blobs.asks.error = None
    assert get(store, 1) == []
    clock.now_s += 1.0
    assert get(store, 1) == [page(1)]
    assert not store.is_degraded
    assert "is read again after 1.0 s" in caplog.text


def test_writes_that_fail_leave_reads_alone(blobs: SharedBlobs, clock: Clock) -> None:
    store = shared(blobs, clock)
    put(store, 1)
    blobs.writes.error = ConnectionError("full")
    assert put(store, 2) == 0
    blobs.writes.error = None
    assert put(store, 2) == 0
    assert get(store, 1) == [page(1)]
    clock.now_s += 1.0
    assert put(store, 2) == 1


# -- forgetting --------------------------------------------------------------------------------


def test_pages_that_are_dropped_are_there_no_more(
    store: PageStore, request: pytest.FixtureRequest
) -> None:
    assert put(store, 1, 2, 3, 4) == 4
    n_dropped = store.drop(hashes(2, 4, 5))
    if "hicache" in request.node.name and not n_dropped:
        pytest.skip("a backend that deletes nothing")
    assert n_dropped >= 2
    assert store.lookup(hashes(1, 2)) == 1
    assert store.lookup(hashes(4)) == 0
    assert get(store, 3) == [page(3)]
    assert store.drop(hashes(2, 4)) == 0
    assert put(store, 1, 2, 3, 4) == 4, "they are stored again"
    assert get(store, 1, 2, 3, 4) == [page(n) for n in (1, 2, 3, 4)]


def test_a_server_drops_what_it_wrote_itself(make_store: MakeStore) -> None:
    first, second = make_store(NAMESPACE), make_store(NAMESPACE)
    if not first.traits.is_shared:
        pytest.skip("one server's alone")
    assert put(first, 1, 2) == 2
    assert put(second, 1, 2) == 2
    assert second.drop(hashes(1, 2)) == 0
    assert get(first, 1, 2) == [page(1), page(2)]
