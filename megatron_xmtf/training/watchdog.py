"""Notice that nothing moves, say who is stuck and where, leave everybody's Python stacks, and end with exit code 6.

    each rank, main thread      phase("reading data", step=7)   beat() at each micro-batch   phase("updating") ...
    each rank, its watchdog     is the phase older than it may be, or has another rank said so?  -> report, exit 6

    OUT/stacks/rank_3.json      host, process; in a hang also step, phase, seconds, micro-batches begun
    OUT/stacks/rank_3.txt       the stacks of all its threads, by faulthandler
    OUT/stacks/hang             some rank has waited too long: all report

The rank to blame is one that reports nothing (stopped, or its interpreter held), else the one that has come least far:
the others wait for it. Nothing crosses ranks while all is well; a rank looks for the file `hang` now and then, at most
every 15 seconds. Time in which the process itself was stopped does not count: a job that was suspended goes on.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_xmtf.config.running import WatchdogConfig
from megatron_xmtf.errors import ExitCode
from megatron_xmtf.files import write_json

__all__ = ["STACKS", "Phase", "Watchdog", "describe_hang"]

STACKS = "stacks"
"""Directory of the reports, in the run directory."""
PHASES = ("starting", "reading data", "forward and backward", "updating", "validating", "checking replicas", "saving")
"""In the order of a step: of two ranks in one step, the one in an earlier phase is the one waited for."""
LONGEST_INTERVAL = 15.0
"""Seconds between two looks of a watchdog; a hang is reported at most two of them late."""
SHOWN_LINES = 30


@dataclass(frozen=True)
class Phase:
    """What a rank does."""

    name: str
    step: int
    beats: int = 0
    """Micro-batches begun in it."""

    def __str__(self) -> str:
        return f"step {self.step}, {self.name}"


class Watchdog:
    """One rank's watchdog; a context manager that watches while it is open, and a notebook of phases at any time.

    Args:    directory: of the reports, the same on all ranks. clock, leave: for tests.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        *,
        directory: Path,
        rank: int,
        world_size: int,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._config, self._directory = config, directory
        self._rank, self._world_size = rank, world_size
        self._clock, self._leave = clock, leave
        self._limits = {
            "starting": 60 * config.start_minutes,
            "validating": 60 * config.validation_minutes,
            "saving": 60 * config.save_minutes,
        }
        self._interval = min(LONGEST_INTERVAL, 60 * config.progress_minutes / 20)
        self._phase = Phase("starting", 0)
        self._is_first_step = True
        self._seen: Phase | None = None
        self._still, self._looked = 0.0, clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def now(self) -> Phase:
        """What this rank does."""
        return self._phase

    def phase(self, name: str, *, step: int) -> None:
        """Begin another phase."""
        assert name in PHASES, f"{name} is no phase"
        if self._phase.name == "updating":
            self._is_first_step = False
        self._phase = Phase(name, step)

    def beat(self) -> None:
        """Say that the phase moves on: another micro-batch."""
        self._phase = Phase(self._phase.name, self._phase.step, self._phase.beats + 1)

    def __enter__(self) -> Watchdog:
        if self._config.enabled:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name in ("hang", f"rank_{self._rank}.txt"):
                (self._directory / name).unlink(missing_ok=True)
            self._report(None)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> bool:
        """Look once; return whether this rank, or another one, has not moved for too long."""
        now, seen = self._clock(), self._phase
        # Two intervals at most: while this process was stopped nothing could move, and nothing hung.
        elapsed = min(now - self._looked, 2 * self._interval)
        self._looked = now
        self._still = self._still + elapsed if seen == self._seen else 0.0
        self._seen = seen
        return self._still > self._limit(seen) or (self._directory / "hang").exists()

    def _limit(self, phase: Phase) -> float:
        """Seconds that a phase may last without a beat; the first step compiles kernels, as a start does."""
        name = "starting" if self._is_first_step and phase.name not in self._limits else phase.name
        return self._limits.get(name, 60 * self._config.progress_minutes)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            if self.look():
                self._end_job()
                return

    def _end_job(self) -> None:
        """Report, wait a moment for the reports of the others, say what is known, and leave."""
        with open(self._directory / f"rank_{self._rank}.txt", "w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        self._report(self._phase)
        (self._directory / "hang").touch()
        deadline = time.monotonic() + 2 * self._interval + 2.0
        while time.monotonic() < deadline and len(_reports(self._directory, self._world_size)[1]) < self._world_size:
            time.sleep(self._interval / 10)
        reported = _reports(self._directory, self._world_size)[1]
        if self._rank == min(reported):
            message = describe_hang(self._directory, self._world_size)
            print(f"rank {self._rank}: HangError: {message}", file=sys.stderr, flush=True)
            status = {"exit_code": int(ExitCode.HANG), "name": ExitCode.HANG.name, "message": f"HangError: {message}"}
            write_json(self._directory.parent / "status.json", status)
        self._leave(int(ExitCode.HANG))

    def _report(self, phase: Phase | None) -> None:
        values = {"rank": self._rank, "host": socket.gethostname(), "process": os.getpid()}
        stuck = {} if phase is None else {**asdict(phase), "seconds": round(self._still, 1)}
        write_json(self._directory / f"rank_{self._rank}.json", {**values, **stuck})


def describe_hang(directory: Path, world_size: int) -> str:
    """Say from the reports which rank is stuck, where, what the others did, and where the stacks are."""
    known, stuck = _reports(directory, world_size)
    silent = [rank for rank in range(world_size) if rank not in stuck]
    if silent:
        culprit = silent[0]
        place = known.get(culprit, {})
        furthest = max((report["step"] for report in stuck.values()), default=0)
        what = (
            f"rank {culprit} on {place.get('host', 'an unknown host')} (process {place.get('process', '?')}) does not "
            f"answer; the others were at step {furthest}. It was stopped, lost its machine, or holds Python's "
            "interpreter in native code"
        )
        shown = min(stuck, default=culprit)
    else:
        culprit = min(stuck, key=lambda rank: _progress(stuck[rank]))
        report = stuck[culprit]
        what = (
            f"rank {culprit} on {report['host']} (process {report['process']}) made no progress for "
            f"{report['seconds']:g} s: step {report['step']}, {report['name']}"
        )
        shown = culprit
    others = "; ".join(
        f"rank {rank}: step {report['step']}, {report['name']}, {report['seconds']:g} s"
        for rank, report in list(stuck.items())[:8]
        if rank != culprit
    )
    stacks = directory / f"rank_{shown}.txt"
    lines = stacks.read_text(encoding="utf-8").splitlines()[:SHOWN_LINES] if stacks.is_file() else []
    return (
        f"{what}. {f'Waiting: {others}. ' if others else ''}The stacks of all ranks are in {directory}; the limits "
        f"are watchdog.*. Rank {shown}:\n" + "\n".join(lines)
    )


def _progress(report: dict[str, object]) -> tuple[int, int, int]:
    return int(str(report["step"])), PHASES.index(str(report["name"])), int(str(report["beats"]))


def _reports(directory: Path, world_size: int) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Return rank -> what is known of it, and of those that have reported a hang."""
    known = {}
    for rank in range(world_size):
        path = directory / f"rank_{rank}.json"
        if path.is_file():
            known[rank] = json.loads(path.read_text(encoding="utf-8"))
    return known, {rank: values for rank, values in known.items() if "step" in values}
