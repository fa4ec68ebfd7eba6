"""The index's lock: nobody waits for more than what is under way, and who else waits."""

from __future__ import annotations

import threading

from disk_builders import wait_until

from tiered_kv.tiers.disk.fair_lock import FairLock


def test_who_waits_comes_before_who_asks_again() -> None:
    lock = FairLock()
    took: list[str] = []

    def wait() -> None:
        with lock:
            took.append("who waited")

    for _ in range(100):
        took.clear()
        other = threading.Thread(target=wait)
        with lock:
            other.start()
            wait_until(lock._door.locked)
        with lock:
            took.append("who asked again")
        other.join()
        assert took == ["who waited", "who asked again"]


def test_it_is_reentrant_and_nobody_else_is_in() -> None:
    lock = FairLock()
    counts = [0, 0]

    def count() -> None:
        for _ in range(2000):
            with lock, lock:
                counts[0] += 1
                with lock:
                    assert counts[0] == counts[1] + 1
                counts[1] += 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [8000, 8000]
