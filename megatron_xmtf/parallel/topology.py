"""Start torch.distributed and Megatron-Core's groups, and say which part of the model this rank holds."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_xmtf.config.schema import ParallelConfig
from megatron_xmtf.errors import ConfigError, RankFailedError
from megatron_xmtf.parallel.cpu_device import enter_cpu_device

__all__ = [
    "Topology",
    "check_world_size",
    "destroy_parallel",
    "initialize_parallel",
    "rendezvous_store",
    "world_size_from_environment",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """This rank's place. Ranks and sizes of each kind of parallelism, and the device it computes on."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits and losses."""
        return self.pp_rank == self.pp_size - 1

    def __str__(self) -> str:
        return f"TP{self.tp_size} x PP{self.pp_size} x DP{self.dp_size} on {self.device.type}"


def world_size_from_environment() -> int:
    """Return WORLD_SIZE as torchrun sets it, 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the data-parallel size.

    Raises:  ConfigError: the world size is below 1, or not a multiple of tp x pp.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size < 1:
        raise ConfigError(f"nproc={world_size}: at least one rank is needed; this layout takes {tp * pp} (--nproc).")
    if world_size % (tp * pp):
        raise ConfigError(
            f"{world_size} ranks cannot hold tensor_model_parallel_size x pipeline_model_parallel_size = {tp} x {pp}: "
            f"the number of ranks must be a multiple of {tp * pp}; start {-(-world_size // (tp * pp)) * tp * pp} ranks "
            "(--nproc) or change parallel.*."
        )
    return world_size // (tp * pp)


def initialize_parallel(
    parallel: ParallelConfig, *, seed: int, store: torch.distributed.Store | None = None
) -> Topology:
    """Start the process group (if it is not running) and Megatron-Core's groups and RNG states.

    Rank and world size come from the environment as torchrun and `parallel.launch` set them.

    Args:    parallel: sizes. seed: of the model-parallel RNG; dropout differs between tensor-parallel ranks.
             store: where the ranks meet; None takes `rendezvous_store()`.
    Raises:  ConfigError: the world size is not a multiple of tp x pp.
    """
    check_world_size(parallel, world_size_from_environment())
    # Megatron-Core's overlap of tensor-parallel communication counts on one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _choose_device()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store or rendezvous_store(timeout=timeout),
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size_from_environment(),
            timeout=timeout,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    # Pipeline stages and data-parallel ranks draw different dropout masks; tensor-parallel ranks differ inside
    # Megatron-Core, by less than 10,000. Megatron-LM's default gives all data-parallel ranks the same masks.
    stage, copy = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    model_parallel_cuda_manual_seed(seed + 10_000 * stage + 100_000_000 * copy, force_reset_rng=True)
    topology = Topology(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
    )
    logger.info("%s", topology)
    return topology


def rendezvous_store(*, timeout: timedelta = timedelta(minutes=10)) -> torch.distributed.Store:
    """Return the key-value store where the ranks of this job meet.

    Local ranks of `parallel.launch` meet in a file, ranks of torchrun or srun at MASTER_ADDR; a process started by
    hand meets nobody, and takes no port that could be another's.

    Args:    timeout: how long a rank waits for the others.
    Raises:  ConfigError: a variable is missing or no number. RankFailedError: the port is taken, or ranks are missing.
    """
    store_file = os.environ.get("XMTF_RENDEZVOUS_FILE")
    if store_file is not None:
        return torch.distributed.FileStore(store_file, world_size_from_environment())
    if "MASTER_ADDR" not in os.environ:
        return torch.distributed.HashStore()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
    except ValueError as error:
        raise ConfigError(
            f"ranks cannot meet at {where}: {error}; the launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        ) from error
    except torch.distributed.DistError as error:
        what = str(error).split("\n", 1)[0]
        taken = "EADDRINUSE" in what
        remedy = "set MASTER_PORT to another port" if taken else "look for the error of the rank that did not come"
        raise RankFailedError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}: the ranks could not "
            f"meet at {where}, where rank 0 listens: {what} {'' if taken else f'({timeout.total_seconds():g} s) '}"
            f"Every rank must reach that address; {remedy}."
        ) from error
    return store


def destroy_parallel() -> None:
    """Take down Megatron-Core's groups and the process group."""
    unset_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _choose_device() -> torch.device:
    """Take this rank's GPU where there is one, else enter the CPU adapter."""
    if not torch.cuda.is_available():
        enter_cpu_device()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most one rank a GPU (--nproc)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
