"""Drift of one number on one rank is found, wherever the parameter is held twice; sound runs pass at every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import ReplicaDriftError
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training import replica_check
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.replica_check import tensor_digest
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import LAYOUTS


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((tensor_digest(first) == tensor_digest(second)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (64, 33)])
def test_every_flipped_bit_changes_the_digest(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert equal(tensor, tensor.clone())
    octets = tensor.view(-1).view(torch.uint8)
    for place in range(0, octets.numel(), max(1, octets.numel() // 50)):
        for bit in (0, 7):
            other = tensor.clone()
            other.view(-1).view(torch.uint8)[place] ^= 1 << bit
            assert not equal(tensor, other), (place, bit)


def test_swapped_values_change_the_digest() -> None:
    tensor = torch.arange(1000, dtype=torch.float32)
    other = tensor.clone()
    other[10:12], other[500:502] = tensor[500:502], tensor[10:12]
    assert int(tensor_digest(tensor)[0]) == int(tensor_digest(other)[0]), "the first sum is blind to order"
    assert not equal(tensor, other)
    assert not equal(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_the_digest_is_a_sum_over_words_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    words = list(memoryview(tensor.numpy().tobytes() + bytes(4)).cast("q"))
    wanted = [sum(words), sum((2 * i + 1) * word for i, word in enumerate(words))]
    for size in (1 << 22, 7, 1):
        monkeypatch.setattr(replica_check, "WORDS_AT_ONCE", size)
        found = tensor_digest(tensor).tolist()
        assert [(ours - theirs) % 2**64 for ours, theirs in zip(found, wanted, strict=True)] == [0, 0]


def test_a_tensor_that_begins_between_words() -> None:
    tensor = torch.arange(101, dtype=torch.bfloat16)
    assert equal(tensor[3:], tensor[3:].clone())


def rank_check(prepared: PreparedRun, drift: tuple[int, str] | None) -> str:
    """Train two steps in one rank, disturb one number of `drift`'s parameter on its rank, compare all ranks."""
    topology = initialize_parallel(prepared.config.parallel, seed=prepared.config.seed)
    trainer = Trainer(prepared, topology)
    for _ in range(2):
        trainer.train_step()
        trainer.check_replicas()
    if drift is not None and topology.rank == drift[0]:
        (parameter,) = [
            parameter
            for chunk in trainer.chunks
            for name, parameter in chunk.named_parameters()
            if name.endswith(drift[1])
        ][:1]
        flat = parameter.data.view(-1)
        flat[5] = torch.nextafter(flat[5], torch.tensor(torch.inf))
    try:
        trainer.check_replicas()
    except ReplicaDriftError as error:
        return str(error)
    return ""


def checked(run_config: Callable[..., RunConfig], name: str, drift: tuple[int, str] | None, **sections: Any) -> str:
    world_size, section = LAYOUTS[name]
    prepared = prepare_run(run_config(parallel=section, **sections), world_size=world_size)
    messages = run_ranks(rank_check, world_size=world_size, arguments=(prepared, drift))
    assert len(set(messages)) == 1, "all ranks raise together, and the same error"
    return str(messages[0])


@pytest.mark.parametrize(
    ("name", "precision"),
    [("TP2-SP-PP2-distributed-optimizer", "bf16"), ("PP2-VPP2", "fp32"), ("DP2-overlap", "fp32")],
)
def test_a_sound_run_passes(name: str, precision: str, run_config: Callable[..., RunConfig]) -> None:
    assert checked(run_config, name, None, precision=precision) == ""


@pytest.mark.parametrize(
    ("name", "rank", "parameter", "words"),
    [
        ("TP2", 1, "1.input_layernorm.weight", "decoder.layers.1.input_layernorm.weight over tensor-parallel ranks"),
        ("TP2-PP2", 3, "0.mlp.linear_fc2.bias", "decoder.layers.2.mlp.linear_fc2.bias over tensor-parallel ranks"),
        ("DP2", 1, "0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.weight over data-parallel ranks"),
        ("PP2-VPP2", 1, "output_layer.weight", "embedding.word_embeddings.weight over pipeline stages"),
    ],
)
def test_drift_names_tensor_ranks_and_values(
    name: str, rank: int, parameter: str, words: str, run_config: Callable[..., RunConfig]
) -> None:
    message = checked(run_config, name, (rank, parameter))
    first = {"TP2": 0, "TP2-PP2": 2, "DP2": 0, "PP2-VPP2": 0}[name]
    assert f"{words}: rank {rank} differs from rank {first} in 1 of " in message
    place, values = message.split("most at ")[1].split(";")[0].split(": ", 1)
    assert place in ("[5]", "[0, 5]")
    ours, theirs = values.split(". All")[0].split(", not ")
    assert float(ours) > float(theirs)
    assert float(ours) - float(theirs) < 1e-6


def test_a_split_parameter_may_differ_over_its_ranks(run_config: Callable[..., RunConfig]) -> None:
    assert checked(run_config, "TP2", (1, "0.mlp.linear_fc1.weight")) == ""
