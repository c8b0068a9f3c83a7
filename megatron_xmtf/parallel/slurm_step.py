"""Join the ranks of a plain `srun`: what Slurm tells each task, in torchrun's words.

    SLURM_PROCID 3   SLURM_LOCALID 1   SLURM_STEP_NUM_TASKS 4   ->   RANK 3   LOCAL_RANK 1   WORLD_SIZE 4
    SLURM_STEP_NODELIST gpu[07-08]                              ->   MASTER_ADDR gpu07, where task 0 runs
    SLURM_JOB_ID 1234   SLURM_STEP_ID 0                         ->   MASTER_PORT 21234, the same on every task

A step of one task is no job of ranks: it starts its own with `--nproc`. Nothing is remembered from one start of a job
to the next, so a requeued job may get other nodes, or the same ones in another order.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, MutableMapping

from megatron_xmtf.errors import ConfigError

__all__ = ["adopt_slurm_step", "expand_first_host", "rendezvous_port"]

FIRST_PORT, PORTS = 20_000, 12_000
"""Ports of rendezvous: below 32,768, where Linux begins to hand out ports by itself."""


def adopt_slurm_step(
    environment: MutableMapping[str, str] | None = None, *, address_of: Callable[[str], str] | None = None
) -> bool:
    """Set torchrun's variables from those of an srun step with several tasks; return whether this is one.

    Variables that are set already stay: MASTER_ADDR and MASTER_PORT may be given by hand.

    Args:    environment: os.environ, or a test's. address_of: finds the address of a host's name.
    Raises:  ConfigError: Slurm's variables contradict each other.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return False
    size, rank = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_PROCID")
    if size is None or rank is None or size == 1:
        return False
    if rank >= size:
        raise ConfigError(f"SLURM_PROCID={rank} is not below SLURM_STEP_NUM_TASKS={size}; start the ranks with srun.")
    # With a GPU of its own a task sees that one alone, and calls it 0.
    local = 0 if environment.get("SLURM_GPUS_PER_TASK") == "1" else _number(environment, "SLURM_LOCALID") or 0
    environment.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(size))
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
        environment["MASTER_ADDR"] = (address_of or _address_of)(expand_first_host(nodes))
    environment.setdefault("MASTER_PORT", str(rendezvous_port(environment)))
    return True


def rendezvous_port(environment: MutableMapping[str, str]) -> int:
    """Return the port of a step: another one for the next step, and after a requeue.

    job 1234, step 0, first start -> 21234; step 1 -> 21241; started again -> 21335
    """
    values = (_number(environment, name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    job, step, restart = values
    return FIRST_PORT + (job + 7 * step + 101 * restart) % PORTS


def expand_first_host(nodes: str) -> str:
    """Return the first host of Slurm's list of nodes.

    n1,n2 -> n1      gpu[07-08,11] -> gpu07      r[1-2]c[0-3] -> r1c0      login -> login

    Raises:  ConfigError: not such a list.
    """
    depth, end = 0, len(nodes)
    for place, letter in enumerate(nodes):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = place
            break
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[:end])
    if not re.fullmatch(r"[\w.-]+", first):
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodes!r} names no host; start the ranks with srun, or set MASTER_ADDR yourself."
        )
    return first


def _address_of(host: str) -> str:
    """Return a name that this machine can resolve: the host's own, or the address that Slurm knows it by."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    command = ["scontrol", "show", "node", host]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"the first node of this job, {host}, has no address here, and `scontrol show node` fails ({error}); set "
            "MASTER_ADDR to an address of it."
        ) from error
    found = re.search(r"\bNodeAddr=(\S+)", told)
    return found.group(1) if found else host


def _number(environment: MutableMapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else None
