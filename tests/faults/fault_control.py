"""Start a drill with `faulty_files.c` preloaded, and steer that library from inside."""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc") or shutil.which("gcc")
MODES = {"fail once": 1, "fail forever": 2, "short write": 3, "kill": 4}
CONTROL, FAULT_ROOT = "XMTF_FAULT_CONTROL", "XMTF_FAULT_ROOT"


class Control:
    """The page that faulty_files.c reads."""

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as stream:
            self._page = mmap.mmap(stream.fileno(), 32)

    def arm(self, target: int, mode: int) -> None:
        """Count from zero, and fault this operation; 0: none. Half of the operations run out of space."""
        self._page[:32] = struct.pack("<4q", 0, 0, mode, errno.ENOSPC if target % 2 else errno.EIO)
        self._page[8:16] = struct.pack("<q", target)

    def disarm(self) -> int:
        """Fault nothing from now on; return the operations counted since `arm`."""
        (count,) = struct.unpack("<q", self._page[:8])
        self.arm(0, 0)
        return int(count)


def run_file_drill(subject: str, inputs: Any, directory: Path, *, stride: int) -> dict[str, Any]:
    """Fault every `stride`-th file operation of a subject in every mode, in a process with the library preloaded.

    Args:    subject: a name of `file_drill.SUBJECTS`. inputs: picklable, what that subject takes. directory: fresh.
    """
    assert COMPILER is not None
    library = directory / "faulty_files.so"
    source = Path(__file__).with_name("faulty_files.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    (directory / "control").write_bytes(bytes(32))
    (directory / "inputs.pickle").write_bytes(pickle.dumps(inputs))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        CONTROL: str(directory / "control"),
        FAULT_ROOT: str(directory / "faulted"),
    }
    words = [subject, str(directory / "inputs.pickle"), str(stride)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.file_drill", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
