"""`python -m megatron_xmtf`, in which rank 1 does something at its third step; run by test_torchrun.py."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_xmtf.cli import main
from megatron_xmtf.training.trainer import Trainer


def deed(name: str) -> None:
    """Do what the test asks for."""
    if name == "raises":
        raise ZeroDivisionError("by hand")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "SIGTERM to torchrun":
        os.kill(os.getppid(), signal.SIGTERM)
    if name == "SIGUSR1 to one rank":
        os.kill(os.getpid(), signal.SIGUSR1)


plain = Trainer.forward_backward


def doing(self: Trainer, batches: Any) -> Any:
    """Do it within step 3 of rank 1, in the first of a run's lives."""
    if self.step == 3 and self.topology.rank == 1 and not self.prepared.start.resumed:
        deed(os.environ["XMTF_DEED"])
    return plain(self, batches)


if __name__ == "__main__":
    Trainer.forward_backward = doing  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
