"""The parent's side of the rendering process: start it, feed it, hold it to its limits, name who broke them.

One worker serves many rows and templates. It is killed when a request takes too long and started afresh, with the
rows at hand, for the next template:

    load(rows)        ->  render(A)  ->  render(B)   B loops: killed, TemplateError names B  ->  render(C)  new worker

A request is one template over the rows of one `load`; the limits are per request, not per record, so that they cost
nothing on the way.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from megatron_xmtf.errors import TemplateError
from megatron_xmtf.prompts.templates.template import SEPARATOR
from megatron_xmtf.prompts.templates.variants import PosedTemplate

__all__ = ["RenderAnswer", "RenderLimits", "RenderWorker"]

START_SECONDS = 60.0
"""A worker that is not ready by then never will be; it takes about 0.15 s on an idle machine."""
MAX_ANSWER_BYTES = 512 << 20
"""Above what an honest answer can have (32 million characters and the choices); a longer one is not read."""


@dataclass(frozen=True)
class RenderLimits:
    """What one request (a template over at most a few hundred rows) may use."""

    cpu_seconds: int = 10
    """Processor time; an ordinary request takes some 0.01 s."""
    wall_seconds: float = 60.0
    """Time on the clock, waiting for a busy machine included."""
    memory_bytes: int = 512 << 20
    """Address space of the worker, the interpreter included."""
    output_characters: int = 1_000_000
    """Length of one rendered text, input and target together."""


@dataclass(frozen=True)
class RenderAnswer:
    """What one template made of the rows at hand."""

    records: list[list[Any]]
    """One outcome a row, as `worker.render_row` describes them."""
    undefined: dict[str, int]
    """Names that were undefined where text was wanted, and how often."""


class RenderWorker:
    """A rendering process; a context manager that ends it."""

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self.limits = limits or RenderLimits()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._known: set[str] = set()
        self._ids: Sequence[str] = ()
        self._rows_frame = b""
        self._rows_sent = False

    def __enter__(self) -> RenderWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def load(self, rows: Sequence[str], ids: Sequence[str]) -> None:
        """Set the rows that the next renders are over.

        Args:    rows: each row's variables as a JSON object. ids: of the same length, for draws and messages.
        """
        protect = [number for number, row in enumerate(rows) if SEPARATOR in row]
        head = f'{{"ids":{json.dumps(list(ids))},"protect":{json.dumps(protect)},"rows":['
        self._rows_frame = "".join((head, ",".join(rows), "]}")).encode("utf-8")
        self._ids, self._rows_sent = ids, False

    def render(
        self, posed: PosedTemplate, *, seed: int, only: Sequence[int] | None = None, styles: Sequence[int] | None = None
    ) -> RenderAnswer:
        """Render one template over the rows at hand.

        Args:    only: numbers of the rows to render, at least one; None: all. styles: for each of them, which of the
                 template's styles its list of options has; None: the variant has no options.
        Raises:  TemplateError: the template tried what it may not do or broke a limit; the worker is gone then, and
                 the next call starts another.
        """
        request: dict[str, Any] = {"render": posed.name, "seed": seed, "only": only, "styles": styles}
        try:
            if self._process is None:
                self._start()
            if not self._rows_sent:
                self._send(self._rows_frame)
                self._rows_sent = True
            if posed.name not in self._known:
                request["template"] = posed.to_worker()
                self._known.add(posed.name)
            self._send(json.dumps(request).encode())
            answer = self._receive(self.limits.wall_seconds)
        except BaseException:
            # Also when interrupted: an answer may be under way, and the next request must not read it as its own.
            self.stop()
            raise
        reason: str | None
        if isinstance(answer, dict):
            reason, row = answer.get("refused"), answer.get("row")
            if reason is None:
                return RenderAnswer(answer["records"], answer["undefined"])
        else:
            reason, row = answer, None
        self.stop()
        on = f"row {self._ids[row]}" if row is not None else f"rows {self._ids[0]} to {self._ids[-1]}"
        raise TemplateError(
            f"{posed.template.source}: template {posed.name!r} {reason} on {on}; mend the template or leave it out."
        )

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                assert stream is not None, "the process was started with all three"
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # what was still buffered for the dead process
        self._process = None

    def _start(self) -> None:
        self._known, self._rows_sent = set(), False
        self._stderr = tempfile.TemporaryFile()
        # Nothing of the caller's environment but where Python finds its modules and shared libraries.
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUTF8": "1"}
        environment["PYTHONHASHSEED"] = "0"
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from megatron_xmtf.prompts.rendering.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd="/",
            env=environment,
            # Out of the terminal's group: an interrupt is the parent's business.
            start_new_session=True,
        )
        limits = self.limits
        self._send(
            json.dumps(
                {
                    "limits": {
                        "cpu_seconds": limits.cpu_seconds,
                        "memory_bytes": limits.memory_bytes,
                        "output_characters": limits.output_characters,
                    }
                }
            ).encode()
        )
        answer = self._receive(START_SECONDS)
        if answer != {"ready": True}:
            self._stderr.seek(0)
            tail = self._stderr.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            self.stop()
            raise RuntimeError(f"the template worker did not start: it {answer}. {' '.join(tail)}".strip())

    def _send(self, body: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None, "started before"
        try:
            self._process.stdin.write(struct.pack(">Q", len(body)) + body)
            self._process.stdin.flush()
        except BrokenPipeError:
            # The worker is dead; the answer that will not come says why.
            return

    def _receive(self, seconds: float) -> Any:
        """Read one answer; a string that says what happened instead, if none comes."""
        deadline = time.monotonic() + seconds
        header = self._read(8, deadline)
        if isinstance(header, str):
            return header
        (size,) = struct.unpack(">Q", header)
        if size > MAX_ANSWER_BYTES:
            return f"breaks the output limit: an answer of {size:,} bytes"
        body = self._read(size, deadline)
        return body if isinstance(body, str) else json.loads(body)

    def _read(self, size: int, deadline: float) -> bytes | str:
        assert self._process is not None and self._process.stdout is not None, "started before"
        descriptor = self._process.stdout.fileno()
        # poll, not select: select refuses descriptors above 1,023, which a training process may well have.
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        received = bytearray()
        while len(received) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return f"breaks the time limit of {self.limits.wall_seconds:g} s on the clock"
            block = os.read(descriptor, min(size - len(received), 1 << 20))
            if not block:
                return self._worded_end(self._process.wait())
            received += block
        return bytes(received)

    def _worded_end(self, returncode: int) -> str:
        if returncode == -signal.SIGXCPU:
            return f"breaks the time limit of {self.limits.cpu_seconds} s of processor time"
        if returncode < 0:
            return f"ended its worker with {signal.Signals(-returncode).name}"
        return f"ended its worker with exit code {returncode}"
