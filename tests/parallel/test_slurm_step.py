"""A task of srun finds its rank, and the first host; ranks that cannot meet say so in bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from megatron_xmtf.errors import ConfigError, RankFailedError
from megatron_xmtf.parallel.slurm_step import adopt_slurm_step, expand_first_host, rendezvous_port
from megatron_xmtf.parallel.topology import rendezvous_store

TASK = {
    # As slurm 22.05 tells task 3 of `srun --nodes=2 --ntasks-per-node=2`, what matters of it.
    **{"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NODELIST": "gpu[06-08]"},
}


def test_a_task_is_a_rank() -> None:
    environment = dict(TASK)
    assert adopt_slurm_step(environment, address_of=lambda host: f"{host}.cluster")
    got = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert got == {
        **{"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07.cluster", "MASTER_PORT": "21234"}
    }


def test_what_is_set_stays_and_a_gpu_of_its_own_is_number_0() -> None:
    environment = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "SLURM_GPUS_PER_TASK": "1"}
    assert adopt_slurm_step(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")
    assert environment["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash, then xmtf train --nproc 4
        {"SLURM_STEP_ID": None},  # the batch script itself, which has SLURM_PROCID and SLURM_NTASKS too
        {"RANK": "0"},  # a worker of torchrun, in a task of srun
        {"SLURM_STEP_NUM_TASKS": None},
    ],
)
def test_what_is_no_rank_of_srun_stays_alone(change: dict[str, str | None]) -> None:
    environment = {name: value for name, value in {**TASK, **change}.items() if value is not None}
    before = dict(environment)
    assert not adopt_slurm_step(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        *(("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-08,11]", "gpu07"), ("r[1-2]c[0-3]", "r1c0"), ("a-[3,5],b", "a-3")),
        *(("node-x.site.org", "node-x.site.org"), ("r1i[0-3]n[00-35]", "r1i0n00"), ("n[5]", "n5")),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert expand_first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[", "$(x)", "a b"])
def test_a_list_that_names_no_host(nodes: str) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        expand_first_host(nodes)


def test_ports_differ_between_steps_and_starts_and_are_nobodys_ephemeral_ones() -> None:
    ports = {
        rendezvous_port({"SLURM_JOB_ID": "77", "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(start)})
        for step in range(5)
        for start in range(5)
    }
    assert len(ports) == 25
    assert all(20_000 <= rendezvous_port({"SLURM_JOB_ID": str(job)}) < 32_000 for job in range(0, 10**7, 9973))


def rank(monkeypatch: pytest.MonkeyPatch, *, number: int, port: int) -> None:
    values = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("number", [0, 1])
def test_one_of_two_ranks_gives_up_in_time(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank(monkeypatch, number=number, port=port)
    started = time.monotonic()
    with pytest.raises(RankFailedError, match=rf"rank {number} of 2 on .*could not meet at 127.0.0.1:{port}") as caught:
        rendezvous_store(timeout=timedelta(seconds=1))
    assert "the rank that did not come" in str(caught.value)
    assert time.monotonic() - started < 60


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rank(monkeypatch, number=0, port=port)
        with pytest.raises(RankFailedError, match=rf"127.0.0.1:{port}.*EADDRINUSE.*set MASTER_PORT to another"):
            rendezvous_store(timeout=timedelta(seconds=5))


def test_a_port_that_is_none_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    rank(monkeypatch, number=0, port=99999)
    with pytest.raises(ConfigError, match="cannot meet at 127.0.0.1:99999"):
        rendezvous_store()


def test_nproc_beside_a_launcher_is_refused() -> None:
    command = [sys.executable, "-m", "megatron_xmtf", "train", "examples/own_data/train.yaml", "--nproc", "2"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nproc 2 beside a launcher, which has started 4 ranks already" in done.stderr
