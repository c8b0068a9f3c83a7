"""Local ranks: results in order, one clear error, nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_xmtf.config import ParallelConfig
from megatron_xmtf.errors import ConfigError, CorruptCheckpointError, ExitCode, NonFiniteError, RankFailedError
from megatron_xmtf.parallel import launch
from megatron_xmtf.parallel.launch import joined_by_launcher, prepare_to_fork, run_ranks
from megatron_xmtf.parallel.topology import check_world_size, destroy_parallel, initialize_parallel


def describe(factor: int) -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "product": factor * int(os.environ["RANK"]),
        "local": os.environ["LOCAL_RANK"],
        "size": os.environ["WORLD_SIZE"],
        "joined": joined_by_launcher(),
        "rendezvous": os.environ["XMTF_RENDEZVOUS_FILE"],
    }


def test_results_come_in_rank_order_from_processes_of_their_own() -> None:
    results = run_ranks(describe, world_size=3, arguments=(10,))
    assert [result["product"] for result in results] == [0, 10, 20]
    assert [result["local"] for result in results] == ["0", "1", "2"]
    assert {result["size"] for result in results} == {"3"}
    assert all(result["joined"] for result in results)
    assert len({result["pid"] for result in results} | {os.getpid()}) == 4
    assert len({result["rendezvous"] for result in results}) == 1
    assert not os.path.exists(str(results[0]["rendezvous"]))


def test_the_callers_environment_is_left_alone() -> None:
    prepare_to_fork()
    before = dict(os.environ)
    run_ranks(describe, world_size=1, arguments=(1,))
    assert dict(os.environ) == before
    assert not joined_by_launcher()


def fail_on(rank: int, error: Exception) -> None:
    """Raise in one rank while the others wait for it in a collective."""
    import torch

    initialize_parallel(ParallelConfig(), seed=1)
    if int(os.environ["RANK"]) == rank:
        raise error
    torch.distributed.barrier()


@pytest.mark.parametrize("error", [ConfigError("lr=-1"), CorruptCheckpointError("half"), NonFiniteError("nan")])
def test_a_users_mistake_in_one_rank_comes_back_as_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        run_ranks(fail_on, world_size=2, arguments=(1, error))
    assert type(caught.value) is type(error)
    assert caught.value.exit_code == error.exit_code  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_a_defect_is_named_with_rank_and_traceback() -> None:
    with pytest.raises(RankFailedError, match="rank 1 failed: ZeroDivisionError: by hand") as caught:
        run_ranks(fail_on, world_size=2, arguments=(1, ZeroDivisionError("by hand")))
    assert "in fail_on" in str(caught.value)
    assert caught.value.exit_code == ExitCode.FAILED
    assert multiprocessing.active_children() == []


def kill_self(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_killed_rank_is_named_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    with pytest.raises(RankFailedError, match=r"rank 2 failed.*killed by SIGKILL"):
        run_ranks(kill_self, world_size=3, arguments=(2,))
    assert multiprocessing.active_children() == []


def ignore_termination(rank: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kill_self(rank)


def test_ranks_that_do_not_listen_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    with pytest.raises(RankFailedError, match="SIGKILL"):
        run_ranks(ignore_termination, world_size=2, arguments=(0,))
    assert multiprocessing.active_children() == []


def write_pid_and_sleep(directory: str) -> None:
    (Path(directory) / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_do_not_outlive_a_killed_parent(how: signal.Signals, tmp_path: Path) -> None:
    parent = multiprocessing.get_context("fork").Process(
        target=run_ranks, args=(write_pid_and_sleep,), kwargs={"world_size": 3, "arguments": (str(tmp_path),)}
    )
    parent.start()

    def pids() -> list[int]:
        return [int(text) for path in tmp_path.iterdir() if (text := path.read_text())]

    wait_until(lambda: len(pids()) == 3)
    assert parent.pid is not None
    os.kill(parent.pid, how)
    parent.join()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids()))


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to pass in a minute")


def leave_early(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os._exit(9)


def test_a_rank_that_leaves_without_a_word_is_an_error() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 failed.*exit code 9"):
        run_ranks(leave_early, world_size=2, arguments=(1,))


def return_what_cannot_be_pickled() -> object:
    return lambda: None


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RankFailedError, match="rank 0 failed"):
        run_ranks(return_what_cannot_be_pickled, world_size=1)


@pytest.mark.parametrize("world_size", [0, -1])
def test_no_ranks_is_the_users_mistake(world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"nproc={world_size}"):
        run_ranks(describe, world_size=world_size, arguments=(1,))


def test_the_data_parallel_size_follows() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert check_world_size(parallel, 6) == 1
    assert check_world_size(parallel, 24) == 4


@pytest.mark.parametrize(("world_size", "remedy"), [(1, 6), (5, 6), (7, 12)])
def test_an_impossible_number_of_ranks_names_a_possible_one(world_size: int, remedy: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    with pytest.raises(ConfigError, match=f"{world_size} ranks .*multiple of 6; start {remedy} ranks"):
        check_world_size(parallel, world_size)


def place(parallel: ParallelConfig) -> tuple[dict[str, int], str, bool]:
    from dataclasses import asdict

    import torch

    topology = initialize_parallel(parallel, seed=1)
    sizes = {name: value for name, value in asdict(topology).items() if name != "device"}
    text, is_last = str(topology), topology.is_last_stage
    destroy_parallel()
    assert not torch.distributed.is_initialized()
    return sizes, text, is_last


def test_each_rank_knows_its_place() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    results = run_ranks(place, world_size=4, arguments=(parallel,))
    for rank, (sizes, text, is_last) in enumerate(results):
        # Megatron-Core's order: tensor-parallel ranks are neighbours, pipeline stages are furthest apart.
        assert (sizes["rank"], sizes["tp_rank"], sizes["pp_rank"], sizes["dp_rank"]) == (rank, rank % 2, rank // 2, 0)
        assert (sizes["tp_size"], sizes["pp_size"], sizes["dp_size"], sizes["world_size"]) == (2, 2, 1, 4)
        assert is_last == (rank // 2 == 1)
        assert text.startswith("TP2 x PP2 x DP1 on ")


def test_a_layout_that_does_not_fit_fails_before_any_group_is_made() -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot hold"):
        run_ranks(place, world_size=2, arguments=(ParallelConfig(tensor_model_parallel_size=3),))
