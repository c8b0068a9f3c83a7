"""One run at a time writes a run directory: `OUT/lock` is held by its launcher, or by rank 0 under torchrun or srun.

    OUT/lock    {"host": "node3", "process": 4711, "job": "1234", "started": "2026-11-30 12:00:05", "beats": 17}

Two proofs that the holder lives, since no shared file system is trusted with one alone:

    flock       the kernel's lock, which ends with the last process of the run, however that ends. It is all that is
                needed on one machine, and between those whose file system carries it (NFS 4, GPFS, Lustre -o flock)
    heartbeat   the holder rewrites the file every 15 seconds. It counts where flock says nothing: between machines
                that do not see each other's locks (Lustre -o localflock), or where there are none at all

A second run waits 15 seconds for a lock that is held (a killed run's ranks may still be ending), then refuses. A lock
that nobody holds, left by another machine, is taken over when it has not changed for 60 seconds; one of this machine
at once. No clocks are compared. A holder that was believed dead, and sees the file in another's hands, ends itself.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import ExitCode, RunLockedError
from megatron_xmtf.files import disk_errors

__all__ = ["LOCK_FILE", "RunLock"]

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
BEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
"""Four beats: NFS may show a file as it was up to 60 seconds ago, though not to one who opens it anew, as we do."""
WAIT_SECONDS = 15.0
"""Ranks end within five seconds of their launcher; their writers end with them."""
POLL_SECONDS = 0.2
READS = 5
"""Tries to read a record that is being rewritten."""
RECORD_BYTES = 512
"""A record is padded to this, so that each is one write and replaces all of the one before."""


class RunLock:
    """The lock of a run directory; to be taken before anything in the directory is written.

    The directory is made if need be, and goes again if nothing but the lock was put into it.

    Args:    leave: ends this process, for tests.
    """

    def __init__(self, output: Path | str, *, leave: Callable[[int], None] = os._exit) -> None:
        self._output = Path(output)
        self._path = self._output / LOCK_FILE
        self._leave = leave
        self._made: list[Path] = []
        self._descriptor = -1
        self._record: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock, and hold it until `release`.

        Raises:  RunLockedError: another run has it; names host, process and job. OSError: the directory cannot be made.
        """
        with disk_errors(self._output / LOCK_FILE):
            try:
                self._take()
            except BaseException:
                self._remove_directories()
                raise
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock up; nothing happens if it was not taken."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._record and self._is_ours():
            # While it is still held: whoever waits for it finds that its file is gone, and makes a new one.
            self._path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            self._close()
        self._record = {}
        self._remove_directories()

    def _take(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            absent = [path for path in (self._output, *self._output.parents) if not path.exists()]
            self._made += [path for path in absent if path not in self._made]
            self._output.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # a run that had made the directory has ended, and removed it
                continue
            try:
                knows_locks = self._flock(deadline)
                if os.fstat(self._descriptor).st_nlink == 0:  # the run that held it has ended, and removed it
                    self._close()
                    continue
                self._refuse_living(_read(self._path), knows_locks=knows_locks)
                self._write_record()
                if not knows_locks:
                    time.sleep(5 * POLL_SECONDS)
                    if not self._is_ours():  # two started in the same moment, and the other wrote last
                        raise self._locked(_read(self._path), "started in the same moment")
            except BaseException:
                self._close()
                raise
            return

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _flock(self, deadline: float) -> bool:
        """Get the kernel's lock; return False where the file system has none.

        Raises:  RunLockedError: it is held past the deadline.
        """
        told = False
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                holder = _read(self._path)
                if time.monotonic() >= deadline:
                    raise self._locked(holder, "holds its lock") from None
                if not told:
                    logger.info("waiting %g s for %s to end", WAIT_SECONDS, _describe(holder))
                    told = True
                time.sleep(POLL_SECONDS)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                logger.warning("%s is on a file system without locks: runs tell each other by heartbeats", self._output)
                return False

    def _refuse_living(self, before: dict[str, Any], *, knows_locks: bool) -> None:
        """Refuse where a holder that the kernel does not know of still beats."""
        if not before or (knows_locks and before.get("host") == socket.gethostname()):
            return
        logger.warning("%s left its lock; taking it over if that stays unchanged for 60 s", _describe(before))
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            now = _read(self._path)
            if not now:  # it has ended
                return
            if now != before:
                raise self._locked(now, "still writes its heartbeat there")

    def _locked(self, holder: dict[str, Any], how: str) -> RunLockedError:
        return RunLockedError(
            f"{self._output} belongs to {_describe(holder)}, which {how}; two runs in one directory would overwrite "
            f"each other. Wait for it, stop it (touch {self._output / 'stop'}), or choose another output."
        )

    def _write_record(self) -> None:
        self._record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "started": datetime.now().isoformat(sep=" ", timespec="seconds"),
            "beats": 0,
        }
        self._beat()

    def _beat(self) -> None:
        data = json.dumps(self._record).encode().ljust(RECORD_BYTES - 1) + b"\n"
        os.pwrite(self._descriptor, data, 0)
        os.fsync(self._descriptor)

    def _is_ours(self) -> bool:
        found = _read(self._path)
        return all(found.get(key) == self._record[key] for key in ("host", "process", "started"))

    def _keep(self) -> None:
        """Beat until the end; end the process if another run took this one for dead, or the file is gone twice."""
        gone = 0
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = _read(self._path)
                gone = 0 if found else gone + 1
                if gone == 1:
                    continue
                if not self._is_ours():
                    holder = _describe(found)
                    message = f"{self._path} is in the hands of {holder}: this run was taken for dead, and ends"
                    print(message, file=sys.stderr, flush=True)
                    self._leave(int(ExitCode.FAILED))
                    return
                self._record["beats"] += 1
                self._beat()
            except OSError as error:  # a server that does not answer now may do so at the next beat
                logger.warning("the lock of the run directory cannot be renewed: %s", error)

    def _remove_directories(self) -> None:
        """Remove what `__enter__` made, if nothing was put into it."""
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                return


def _read(path: Path) -> dict[str, Any]:
    """Read a lock's record, with a look at the server; {}: there is none, or none that is whole."""
    for _ in range(READS):
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:  # it is being written, or has never been
            time.sleep(POLL_SECONDS)
            continue
        return record if isinstance(record, dict) else {}
    return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"the run of process {holder.get('process')} on {holder.get('host')}{job}, started {holder.get('started')}"
