"""A lock on a run's folder: it names its owner, and a crash does not leave it locked."""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = "run.lock"
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # what file systems say that have none
BEAT = 5.0  # seconds between the owner's signs of life, the file's modification time


class LockedError(OSError):
    """Another run writes to this folder; the message names it."""


class RunLock:
    """The lock of a run's folder: RUN/run.lock with host, process id and start time of its owner.

    A lock of this host whose process has ended is taken over at once, with a line that says so; one of another host
    when it shows no sign of life for three beats, which are waited for.

    Args:
        folder: of the run; made if it is not there.
        beat: seconds between signs of life.
    """

    def __init__(self, folder: Path, beat: float = BEAT):
        self.path, self.beat = folder / NAME, beat
        self._over = threading.Event()
        self._owned: dict[str, Any] | None = None

    def acquire(self) -> None:
        """Takes the lock; does nothing when this process holds it already.

        Raises:
            LockedError: another run holds it.
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}
        while not self._create(own):
            owner = self._owner()
            if owner == own:
                break
            if owner is not None and not self._stale(owner, own):
                raise LockedError(
                    f"{self.path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}; wait for it,"
                    f" end it, or set another exp_manager.explicit_log_dir ({self.path} names it)"
                )
            if owner is not None:
                logger.warning(
                    "%s was left by process %s on %s, which has ended: taken over", self.path, *_named(owner)
                )
            # Renamed before it is deleted: of two runs that find it stale only one has something to rename.
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, gone := self.path.with_name(f"{NAME}.{os.getpid()}"))
                os.unlink(gone)
        self._owned = own
        self._over.clear()
        threading.Thread(target=self._live, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Releases the lock, if this process still holds it."""
        self._over.set()
        if self._owned is not None and self._owner() == self._owned:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._owned = None

    def _create(self, own: dict[str, Any]) -> bool:
        """Creates the lock file atomically; returns False when it exists already."""
        draft, text = self.path.with_name(f"{NAME}.{os.getpid()}"), json.dumps(own) + "\n"
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            return self._create_in_place(text)
        finally:
            os.unlink(draft)
        return True

    def _create_in_place(self, text: str) -> bool:
        """`_create` on a file system without hard links, where another run may see the file before it is written."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _owner(self) -> dict[str, Any] | None:
        """Who holds the lock; None when nobody does, an empty name when the file is damaged."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _stale(self, owner: dict[str, Any], own: dict[str, Any]) -> bool:
        if owner.get("host") == own["host"] and isinstance(owner.get("pid"), int):
            return _start_time(owner["pid"]) != owner.get("started")
        before = self._modified()
        logger.warning("%s is held on %s; waiting %g s for a sign of life", self.path, _named(owner)[1], 3 * self.beat)
        time.sleep(3 * self.beat)
        return self._modified() == before

    def _modified(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    def _live(self) -> None:
        while not self._over.wait(self.beat):
            with contextlib.suppress(OSError):  # a full disk: the lock stays, with an older heartbeat
                os.utime(self.path)


def _named(owner: dict[str, Any]) -> tuple[Any, Any]:
    return owner.get("pid", "unknown"), owner.get("host", "an unknown host")


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks and since its boot; None when it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else f"{boot} {fields[19]}"
