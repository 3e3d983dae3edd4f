"""Heartbeats of all ranks: a rank that times out can name the rank it waited for, and the reason."""

import json
import threading
import time
from typing import Any

BEAT = 2.0  # seconds between heartbeats


class RankWatch:
    """Each rank writes into the job's store where it is, from a thread of its own, and why it failed.

    Args:
        store: of the job; any with `set`, `get` and `check`, as torch.distributed's.
        rank, size: of this process, of the job.
        beat: seconds between signs of life.
    """

    def __init__(self, store: Any, rank: int, size: int, beat: float = BEAT):
        self.store, self.rank, self.size, self.beat = store, rank, size, beat
        self._at, self._since = "its start", time.monotonic()
        self._over = threading.Event()
        self._write(0)
        threading.Thread(target=self._live, name="rank watch", daemon=True).start()

    def at(self, what: str) -> None:
        """Notes what this rank does now, such as "step 12, its data"."""
        self._at, self._since = what, time.monotonic()

    def failed(self, error: BaseException) -> None:
        """Tells the others why this rank ends."""
        self.store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error} (in {self._at})")

    def close(self) -> None:
        self._over.set()

    def _write(self, count: int) -> None:
        sign = {"count": count, "at": self._at, "for": round(time.monotonic() - self._since)}
        self.store.set(f"alive/{self.rank}", json.dumps(sign))

    def _live(self) -> None:
        count = 0
        while not self._over.wait(self.beat):
            count += 1
            try:
                self._write(count)
            except RuntimeError:  # the process that keeps the store has ended
                return

    def diagnosis(self, timed_out: bool) -> str | None:
        """Which other rank is the cause of this one's trouble, and why; None when none is. Takes three beats.

        Args:
            timed_out: whether this rank has waited too long; then a rank that lives and lags behind is a cause, too.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = self._signs(others)
            time.sleep(3 * self.beat)
            found = [self._failure(rank) for rank in others]
            after = self._signs(others)
            silent = [rank for rank in others if after[rank]["count"] == before[rank]["count"]]
            # A rank that has made its own diagnosis has ended for a known cause; it is not the cause.
            silent = [rank for rank in silent if not self.store.check([f"has read/{rank}"])]
        except RuntimeError as error:
            return f"the job's store, which rank 0 or the launcher keeps, does not answer: it has ended ({error})"
        self._let_others_read([rank for rank in others if rank not in silent])
        causes = [cause for cause in found if cause is not None]
        if not causes:
            causes = [
                f"rank {rank} has ended without a word (killed, or out of memory), last heard of in {after[rank]['at']}"
                for rank in silent
            ]
        if not causes and timed_out:
            causes = [f"rank {rank} is in {after[rank]['at']} for {after[rank]['for']} s" for rank in others]
            causes.append(f"this rank, {self.rank}, is in {self._at}")
        return "; ".join(causes) or None

    def _let_others_read(self, others: list[int]) -> None:
        """Keeps rank 0, whose process may hold the store, until the others have read it, for ten beats at most."""
        try:
            self.store.set(f"has read/{self.rank}", "")
            end = time.monotonic() + 10 * self.beat
            while self.rank == 0 and time.monotonic() < end:
                if all(self.store.check([f"has read/{rank}"]) for rank in others):
                    return
                time.sleep(self.beat / 4)
        except RuntimeError:  # the launcher kept it, and has ended
            return

    def _signs(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        return {rank: json.loads(self.store.get(f"alive/{rank}")) for rank in ranks}

    def _failure(self, rank: int) -> str | None:
        key = f"failed/{rank}"
        return f"rank {rank} failed: {self.store.get(key).decode()}" if self.store.check([key]) else None
