"""What the drills share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of flushes to a disk would take most of the time."""
    memory = Path("/dev/shm")
    if not (os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="xmtf-drill-") as name:
        yield Path(name)
