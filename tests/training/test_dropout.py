"""Dropout: the masks that ranks really draw, the same loss in `transformers` under the same masks, recomputation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray
from transformers import BloomForCausalLM

from megatron_xmtf.config import DropoutConfig, ParallelConfig, RunConfig
from megatron_xmtf.data.batch import Batch, build_batch
from megatron_xmtf.data.rows import pack_examples
from megatron_xmtf.models.bloom_architecture import BloomArchitecture
from megatron_xmtf.models.registry import transformer_config
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.trainer import Trainer
from tests.layouts import PP, TP
from tests.training.curves import Curve, Run, curves

RATE, LAYERS = 0.3, 4
DROPOUT = {"hidden_dropout": RATE, "attention_dropout": RATE}
Mask = tuple[str, NDArray[np.bool_]]
"""attention [b, heads / tp, s, s] or hidden [s, b, h] ([s / tp, b, h] under sequence parallelism); True: kept."""


def record_masks() -> list[Mask]:
    """Make dropout in this process append to the list that is returned, in the order in which it is drawn."""
    masks: list[Mask] = []
    hidden, attention = torch.nn.functional.dropout, torch.dropout

    def drop_hidden(input: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
        dropped = hidden(input, p, training, inplace)
        masks.append(("hidden", (dropped != 0).numpy().copy()))
        return dropped

    def drop_attention(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        dropped = attention(input, p, train)
        masks.append(("attention", (dropped != 0).numpy().copy()))
        return dropped

    torch.nn.functional.dropout, torch.dropout = drop_hidden, drop_attention
    return masks


def rank_masks(runs: Mapping[str, PreparedRun], batches: list[Batch] | None = None) -> dict[str, Any]:
    """Return this rank's masks of one forward and backward pass of each run, and the loss where it is known."""
    torch.set_num_threads(1)
    masks, found = record_masks(), {}
    for name, prepared in runs.items():
        topology = initialize_parallel(prepared.config.parallel, seed=1)
        trainer = Trainer(prepared, topology)
        reports = trainer.forward_backward(batches or trainer.loader.micro_batches(0)[:2])
        loss = float(reports[0][0] / reports[0][1]) if reports else None
        found[name] = (list(masks), loss)
        masks.clear()
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    from tests.conftest import make_run_config

    return make_run_config(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("dropout"))


@pytest.fixture(scope="module")
def drawn(make: Callable[..., RunConfig]) -> dict[str, list[list[Mask]]]:
    """For each layout, the masks of each of four ranks."""
    layouts = {
        # ranks 0 and 1 are a tensor-parallel pair, 2 and 3 that of the other copy of the model, or of the other stage
        "TP2-DP2": {TP: 2},
        "TP2-SP-DP2": {TP: 2, "sequence_parallel": True},
        "TP2-PP2": {TP: 2, PP: 2},
        "TP2-SP-PP2": {TP: 2, PP: 2, "sequence_parallel": True},
    }
    kernel = {"attention": "reference"}
    runs = {
        name: prepare_run(make(parallel=section, dropout=DROPOUT, kernels=kernel), world_size=4)
        for name, section in layouts.items()
    }
    ranks = run_ranks(rank_masks, world_size=4, arguments=(runs,))
    return {name: [rank[name][0] for rank in ranks] for name in layouts}


def of_kind(masks: list[Mask], kind: str) -> list[bytes]:
    return [mask.tobytes() for kinds, mask in masks if kinds == kind]


@pytest.mark.parametrize("name", ["TP2-DP2", "TP2-SP-DP2", "TP2-PP2", "TP2-SP-PP2"])
def test_every_mask_of_a_rank_is_drawn_once_at_its_rate(name: str, drawn: dict[str, list[list[Mask]]]) -> None:
    layers = LAYERS // 2 if "PP2" in name else LAYERS
    for rank, masks in enumerate(drawn[name]):
        has_embedding = "PP2" not in name or rank < 2
        layer = ["attention", "hidden", "hidden"]
        assert [kind for kind, _ in masks] == 2 * (["hidden"] * has_embedding + layer * layers)
        for kind in ("attention", "hidden"):
            assert len(set(of_kind(masks, kind))) == len(of_kind(masks, kind)), "no mask is drawn again"
        hidden = np.concatenate([mask.ravel() for kind, mask in masks if kind == "hidden"])
        assert hidden.mean() == pytest.approx(1 - RATE, abs=5 * (RATE * (1 - RATE) / hidden.size) ** 0.5)
        for kind, mask in masks:
            if kind == "attention":
                heads = mask.swapaxes(0, 1).reshape(mask.shape[1], -1)
                assert len({head.tobytes() for head in heads}) == len(heads), "each head has its own"


@pytest.mark.parametrize("name", ["TP2-DP2", "TP2-SP-DP2", "TP2-PP2", "TP2-SP-PP2"])
def test_tensor_parallel_ranks_drop_alike_what_they_both_hold_and_apart_what_they_share(
    name: str, drawn: dict[str, list[list[Mask]]]
) -> None:
    for first, second in ((0, 1), (2, 3)):
        one, other = drawn[name][first], drawn[name][second]
        # Heads differ between the two; so do the tokens of hidden states under sequence parallelism.
        assert not set(of_kind(one, "attention")) & set(of_kind(other, "attention"))
        if "SP" in name:
            assert not set(of_kind(one, "hidden")) & set(of_kind(other, "hidden"))
        else:
            assert of_kind(one, "hidden") == of_kind(other, "hidden")


@pytest.mark.parametrize("name", ["TP2-DP2", "TP2-SP-DP2", "TP2-PP2", "TP2-SP-PP2"])
def test_copies_and_stages_draw_masks_of_their_own(name: str, drawn: dict[str, list[list[Mask]]]) -> None:
    for first, second in ((0, 2), (1, 3), (0, 3), (1, 2)):
        for kind in ("attention", "hidden"):
            one, other = of_kind(drawn[name][first], kind), of_kind(drawn[name][second], kind)
            assert one and other
            assert not set(one) & set(other)


def test_the_loss_equals_transformers_under_the_same_masks(
    make: Callable[..., RunConfig], tiny_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(3)
    inputs, targets = ([int(i) for i in generator.integers(4, 260, count)] for count in (40, 25))
    (row,) = pack_examples([(inputs, targets)], sequence_length=64, pad_id=3)  # one example fills the row
    batch = build_batch([row], normalization="target_token")
    prepared = prepare_run(make(dropout=DROPOUT, kernels={"attention": "reference"}), world_size=1)
    ((masks, loss),) = run_ranks(rank_masks, world_size=1, arguments=({"run": prepared}, [batch]))[0].values()
    assert len(masks) == 1 + 3 * LAYERS

    model = BloomForCausalLM.from_pretrained(
        tiny_hf, dtype=torch.float32, attn_implementation="eager", **DROPOUT
    ).train()
    pending = [(kind, torch.from_numpy(mask)) for kind, mask in masks]

    def replay(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        assert (p, training) == (RATE, True)
        kind, mask = pending.pop(0)
        # ours [s, b, h], theirs [b, s, h]; attention is [b, heads, query, key] in both
        mask = mask.transpose(0, 1) if kind == "hidden" else mask.reshape(input.shape)
        return input * mask / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", replay)
    # `transformers` has no embedding dropout: it is put behind the embedding's norm, as Megatron has it.
    model.transformer.word_embeddings_layernorm.register_forward_hook(lambda *call: replay(call[-1], RATE))

    @torch.no_grad()
    def theirs() -> float:
        logits = model(torch.tensor([inputs + targets[:-1]])).logits[0, len(inputs) - 1 :]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets)))

    assert loss == pytest.approx(theirs(), rel=1e-5)
    assert not pending, "every mask was used"
    # Negative control: without dropout the loss is another one.
    monkeypatch.undo()
    model.transformer.word_embeddings_layernorm._forward_hooks.clear()
    model.eval()
    assert abs(theirs() - loss) > 100 * 1e-5 * loss


RECOMPUTED: dict[str, dict[str, Any]] = {
    "selective": {"granularity": "selective"},
    "full-uniform": {"granularity": "full"},
    "full-block": {"granularity": "full", "method": "block", "num_layers": 1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {TP: 2}),
    "TP2-SP": (2, {TP: 2, "sequence_parallel": True}),
    "PP2-VPP2": (2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def recomputed(make: Callable[..., RunConfig]) -> dict[tuple[str, str], Curve]:
    """Three steps with dropout at each layout, with and without recomputation; and one run without dropout."""
    runs = {}
    for name, (ranks, section) in LAYOUTS.items():
        for how, recompute in {"none": {}, **RECOMPUTED}.items():
            config = make(parallel=section, dropout=DROPOUT, recompute=recompute)
            runs[name, how] = Run(prepare_run(config, world_size=ranks), ranks, 3)
    runs["TP1", "without dropout"] = Run(prepare_run(make(), world_size=1), 1, 3)
    runs["TP1", "attention alone"] = Run(prepare_run(make(dropout={"attention_dropout": RATE}), world_size=1), 1, 3)
    return curves(runs)


@pytest.mark.parametrize("how", RECOMPUTED)
@pytest.mark.parametrize("name", LAYOUTS)
def test_recomputation_draws_the_same_dropout(name: str, how: str, recomputed: dict[tuple[str, str], Curve]) -> None:
    assert recomputed[name, how] == recomputed[name, "none"]


def test_each_rate_is_taken_from_the_configuration(recomputed: dict[tuple[str, str], Curve]) -> None:
    losses = [recomputed["TP1", how][0][0] for how in ("none", "without dropout", "attention alone")]
    assert len(set(losses)) == 3


def test_without_a_setting_the_model_says() -> None:
    model = BloomArchitecture(
        hidden_size=64, num_layers=2, num_attention_heads=4, vocab_size=300, hidden_dropout=0.2, attention_dropout=0.4
    )

    def rates(**settings: float) -> tuple[float, float]:
        config = transformer_config(
            model, parallel=ParallelConfig(), precision="fp32", dropout=DropoutConfig(**settings)
        )
        return config.hidden_dropout, config.attention_dropout

    assert rates() == (0.2, 0.4)
    assert rates(hidden_dropout=0.0) == (0.0, 0.4), "0 turns it off"
    assert rates(hidden_dropout=0.1, attention_dropout=0.3) == (0.1, 0.3)
