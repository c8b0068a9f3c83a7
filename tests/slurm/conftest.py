"""One cluster for all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.virtual_cluster import VirtualCluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[VirtualCluster]:
    """A running cluster; skips where none can be started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # What a job of another cluster has set must not reach this one.
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("SLURM", "SBATCH"))}
    try:
        with VirtualCluster() as started:
            yield started
    finally:
        os.environ.update(kept)
