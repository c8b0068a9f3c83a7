"""What goes wrong in silence when an encoder-decoder is split: each fault is shown without its cure, and cured.

The cures are in `models/relative_bias.py` and `models/encoder_decoder*.py`; logits, gradients and curves of layouts
are in `test_encoder_decoder.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor, nn

from megatron_xmtf.checkpoint.sharded import load_training_state
from megatron_xmtf.config import RunConfig
from megatron_xmtf.errors import RankFailedError
from megatron_xmtf.models.encoder_decoder_layers import DroppingRowParallelLinear, own_dropout
from megatron_xmtf.models.forward import run_logits
from megatron_xmtf.parallel.launch import run_ranks
from tests.encoder_decoder import batches_of, set_weights
from tests.encoder_decoder_engine import Shard, assemble, run_config, start_engine
from tests.layouts import PP, TP
from tests.models.test_encoder_decoder import EXAMPLES, HELD, ROWS, expected_logits, ours, theirs, worst_difference
from tests.parallel.tiny_engine import save_checkpoint

DP2_DISTRIBUTED = {PP: 2, "use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}
TABLES = ("encoder.relative_attention_bias.weight", "decoder.relative_attention_bias.weight")


# Tables of relative positions on several stages


def remove_cure(fault: str) -> None:
    """Take one cure away; called before the model is built."""
    import megatron_xmtf.models.encoder_decoder as encoder_decoder
    import megatron_xmtf.models.engine_settings as engine_settings
    import megatron_xmtf.models.registry as registry
    import megatron_xmtf.models.relative_bias as relative_bias

    built = relative_bias.RelativeBias.__init__

    def build(self: Any, *arguments: Any, **keywords: Any) -> None:
        built(self, *arguments, **keywords)
        if fault == "one bucket with others":
            self.weight.shared_embedding = False
        if fault == "counted on each stage":
            self.weight.shared = False

    relative_bias.RelativeBias.__init__ = build  # type: ignore[method-assign]
    if fault == "no sum over stages":
        right = engine_settings.transformer_config

        def without_sum(*arguments: Any, **keywords: Any) -> Any:
            config = right(*arguments, **keywords)
            config.has_cond_embedder = False
            return config

        registry.transformer_config = without_sum
    if fault == "no zeros":
        encoder_decoder.give_unused_table_zeros = lambda hidden, table: hidden


def rank_steps(fault: str, config: RunConfig, steps: int) -> tuple[list[tuple[float, float]], list[Shard], list[Shard]]:
    """Return the curve, and this rank's weights and gradients after the last step."""
    remove_cure(fault)
    engine = start_engine(*ours("mt5"), config)
    batches = batches_of(ROWS)
    curve = [engine.train_step(batches) for _ in range(steps)]
    return curve, engine.weights(), engine.gradients()


def run(fault: str, world_size: int, parallel: dict[str, Any], *, steps: int = 2) -> list[Any]:
    ours("mt5")
    return run_ranks(rank_steps, world_size=world_size, arguments=(fault, run_config(parallel=parallel), steps))


@pytest.fixture(scope="module")
def reference() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    [(curve, weights, _)] = run("", 1, {})
    return curve, assemble([weights])


def drift(results: list[Any]) -> float:
    """Return the largest difference between copies of the tables on different ranks."""
    copies: dict[Any, list[Tensor]] = {}
    for _, weights, _ in results:
        for name, _, offset, value in weights:
            if name in TABLES:
                copies.setdefault((name, offset), []).append(value)
    return max(float((value - values[0]).abs().max()) for values in copies.values() for value in values)


def test_tables_without_a_sum_over_stages_drift_apart() -> None:
    assert drift(run("", 2, {PP: 2})) == 0.0
    assert drift(run("no sum over stages", 2, {PP: 2})) > 1e-3


def test_unused_tables_without_zeros_end_an_overlapped_reduction() -> None:
    split = {PP: 2, "pipeline_layers": [4, 3], **OVERLAP}
    assert drift(run("", 2, split)) == 0.0
    with pytest.raises(RankFailedError, match="per_param_grad_ready_counts|AssertionError|Assertion"):
        run("no zeros", 2, split)


def test_tables_in_one_bucket_with_others_are_summed_with_them(reference: Any) -> None:
    # Stages hold other layers, so a table lies elsewhere in their buckets, and data-parallel ranks hold other parts.
    split = {**DP2_DISTRIBUTED, "pipeline_layers": [5, 2]}
    assert drift(run("", 4, split)) == 0.0
    assert drift(run("one bucket with others", 4, split)) > 1e-4


def test_the_gradient_norm_counts_a_table_once(reference: Any) -> None:
    wanted = reference[0][0][1]
    assert run("", 2, {PP: 2})[0][0][0][1] == pytest.approx(wanted, rel=1e-5)
    assert run("counted on each stage", 2, {PP: 2})[0][0][0][1] > wanted * (1 + 1e-4)


# The tensor that travels


def rank_with_freed_outputs(config: RunConfig) -> list[tuple[float, float]]:
    engine = start_engine(*ours("mt5"), config)
    get_model_config(engine.chunks[0]).deallocate_pipeline_outputs = True
    return [engine.train_step(batches_of(ROWS)) for _ in range(2)]


def test_outputs_may_be_freed_once_they_are_sent(reference: Any) -> None:
    # Megatron-Core asserts that an output is no view of another tensor, then takes its memory away.
    config = run_config(parallel={PP: 4, "pipeline_layers": [2, 2, 2, 1]})
    for curve in run_ranks(rank_with_freed_outputs, world_size=4, arguments=(config,)):
        for mine, wanted in zip(curve, reference[0], strict=True):
            assert mine == pytest.approx(wanted, rel=1e-4)


def rank_of_other_lengths(config: RunConfig) -> None:
    from dataclasses import replace

    engine = start_engine(*ours("mt5"), config)
    batches = batches_of(ROWS)
    if torch.distributed.get_rank() == 1:
        batches = [replace(batch, encoder_segment_ids=batch.encoder_segment_ids[:, :-2]) for batch in batches]
        batches = [replace(batch, encoder_tokens=batch.encoder_tokens[:, :-2]) for batch in batches]
    engine.forward_backward(batches)


def test_a_stage_that_would_cut_elsewhere_is_an_error() -> None:
    with pytest.raises(RankFailedError, match="received 40, not"):
        run_ranks(rank_of_other_lengths, world_size=2, arguments=(run_config(parallel={PP: 2}),))


# Dropout


def dropping(sections: dict[str, Any]) -> RunConfig:
    return run_config(dropout={"hidden_dropout": 0.2, "attention_dropout": 0.2}, **sections)


def rank_dropout_gradient(config: RunConfig, directions: dict[str, Tensor]) -> tuple[float, list[Shard], list[float]]:
    """Return loss and gradients under dropout, and the losses a little to both sides along a direction, same masks."""
    architecture, whole = ours("mt5")
    engine = start_engine(architecture, whole, config)

    def loss_at(weights: dict[str, Tensor]) -> float:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        set_weights(engine.chunks, weights)
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        return engine.forward_backward(batches_of(ROWS[:4]))

    loss = loss_at(whole)
    gradients = engine.gradients()
    step = 2e-3
    ends = [
        loss_at({name: value + sign * step * directions[name] for name, value in whole.items()}) for sign in (1, -1)
    ]
    return loss, gradients, ends


@cache
def expected_loss() -> float:
    """Return the loss without dropout, by `transformers`."""
    numbers = [int(example) for row in ROWS[:4] for example in row.example_ids]
    losses = [
        torch.nn.functional.cross_entropy(
            expected_logits("mt5")[number].detach(), torch.tensor(EXAMPLES[number][1]), reduction="sum"
        )
        for number in numbers
    ]
    return float(sum(losses)) / sum(len(EXAMPLES[number][1]) for number in numbers)


SEQUENCE_PARALLEL = {TP: 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("world_size", "parallel", "granularity"),
    [
        (1, {}, "none"),
        (1, {}, "selective"),
        (1, {}, "full"),
        (2, SEQUENCE_PARALLEL, "none"),
        (2, SEQUENCE_PARALLEL, "full"),
        (4, {TP: 2, PP: 2}, "selective"),
        (4, {**SEQUENCE_PARALLEL, PP: 2}, "full"),
    ],
    ids=["TP1", "TP1-selective", "TP1-full", "TP2-SP", "TP2-SP-full", "TP2-PP2-selective", "TP2-SP-PP2-full"],
)
def test_backward_and_recomputation_use_the_masks_of_the_forward_pass(
    world_size: int, parallel: dict[str, Any], granularity: str
) -> None:
    _, whole = ours("mt5")
    generator = torch.Generator().manual_seed(5)
    directions = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in whole.items()}
    config = dropping({"parallel": parallel, "recompute": {"granularity": granularity}})
    results = run_ranks(rank_dropout_gradient, world_size=world_size, arguments=(config, directions))
    gradients = assemble([gradients for _, gradients, _ in results])
    loss, _, (after, before) = results[0]
    assert abs(loss - expected_loss()) > 1e-2, "dropout must show"
    predicted = sum(float((gradients[name] * directions[name]).sum()) for name in whole)
    assert (after - before) / 4e-3 == pytest.approx(predicted, rel=2e-2)


def rank_masks(config: RunConfig) -> dict[str, list[bool]]:
    """Return masks drawn where ranks hold copies, or other parts."""
    engine = start_engine(*ours("mt5"), config)
    engine.chunks[0].train()
    model = unwrap_model(engine.chunks[0])
    hidden = torch.ones(12, 2, model.config.hidden_size)
    inner = [module for module in model.modules() if isinstance(module, DroppingRowParallelLinear)][0]
    seen: list[Tensor] = []
    inner.weight.data.fill_(1.0)
    straight = nn.functional.dropout
    nn.functional.dropout = lambda tensor, rate: seen.append(straight(tensor, rate)) or seen[-1]  # type: ignore
    dropped = model.encoder._drop(hidden)
    # Under sequence parallelism the stack has forked the generator around all layers.
    with own_dropout(forked=not config.parallel.sequence_parallel):
        inner(torch.ones(12, 2, inner.input_size_per_partition))
    nn.functional.dropout = straight
    return {"residual": (dropped > 0).flatten().tolist(), "columns": (seen[-1] > 0).flatten().tolist()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_drop_alike_what_they_hold_copies_of_and_otherwise_what_they_share(sequence_parallel: bool) -> None:
    config = dropping({"parallel": {TP: 2, "sequence_parallel": sequence_parallel}})
    first, second = run_ranks(rank_masks, world_size=2, arguments=(config,))
    assert first["columns"] != second["columns"]
    assert (first["residual"] != second["residual"]) == sequence_parallel
    kept = sum(first["residual"]) / len(first["residual"])
    assert kept == pytest.approx(0.8, abs=0.05)


# bf16


def rank_bf16(config: RunConfig) -> tuple[list[Any], list[tuple[float, float]]]:
    engine = start_engine(*ours("mt5"), config)
    logits = run_logits(engine.chunks, batches_of(ROWS), lambda batch, logits: logits.numpy())
    return logits, [engine.train_step(batches_of(ROWS)) for _ in range(3)]


def test_bf16_is_at_most_twice_as_far_off_as_transformers(reference: Any) -> None:
    import copy

    model = copy.deepcopy(theirs("mt5")).bfloat16()
    with torch.no_grad():
        error = max(
            float(
                (
                    model(
                        input_ids=torch.tensor([EXAMPLES[number][0]]),
                        decoder_input_ids=torch.tensor([[0, *EXAMPLES[number][1][:-1]]]),
                    ).logits[0]
                    - expected_logits("mt5")[number]
                )
                .abs()
                .max()
            )
            for number in HELD
        )
    config = run_config(precision="bf16", parallel={TP: 2, PP: 2, "sequence_parallel": True})
    for logits, curve in run_ranks(rank_bf16, world_size=4, arguments=(config,)):
        assert worst_difference(logits, expected_logits("mt5"), ROWS) <= 2 * error
        for mine, wanted in zip(curve[:2], reference[0], strict=True):
            assert mine[0] == pytest.approx(wanted[0], rel=2e-2)


# Checkpoints


def rank_save(name: str, directory: Path, config: RunConfig) -> list[tuple[float, float]]:
    """Train two steps, save, train two more."""
    engine = start_engine(*ours(name), config)
    batches = batches_of(ROWS)
    for _ in range(2):
        engine.train_step(batches)
    save_checkpoint(engine, directory / "step_0000002", side_files=directory)
    return [engine.train_step(batches) for _ in range(2)]


def rank_load(name: str, directory: Path, config: RunConfig) -> tuple[list[tuple[float, float]], list[Shard]]:
    """Load at another layout; train two steps."""
    engine = start_engine(ours(name)[0], None, config)
    load_training_state(engine.chunks, engine.optimizer, directory / "step_0000002")
    weights = engine.weights()
    return [engine.train_step(batches_of(ROWS)) for _ in range(2)], weights


RESHARDS = {
    # A table of 32 x 4 / 2 numbers a rank is no multiple of what a bucket is padded to, lcm(2, 128).
    "TP2-PP2 to PP4": ({TP: 2, PP: 2}, {PP: 4, "pipeline_layers": [1, 3, 2, 1]}),
    "distributed, TP2-DP2 to PP2-DP2": (
        {TP: 2, "use_distributed_optimizer": True},
        {PP: 2, "use_distributed_optimizer": True, "pipeline_layers": [5, 2]},
    ),
    "distributed, PP2-DP2 to PP2-VPP2-TP2": (
        {PP: 2, "use_distributed_optimizer": True},
        {TP: 2, PP: 2, "virtual_pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
}


@pytest.mark.parametrize(
    ("case", "optimizer", "name"),
    [
        *((case, "adamw", "mt5") for case in RESHARDS),
        ("TP2-PP2 to PP4", "adafactor", "mt5"),
        # T5 1.0, whose head is the embedding, held by the first and the last stage.
        ("distributed, TP2-DP2 to PP2-DP2", "adamw", "1.0"),
    ],
)
def test_a_run_goes_on_at_another_layout(case: str, optimizer: str, name: str, tmp_path: Path) -> None:
    before, after = (dict(parallel) for parallel in RESHARDS[case])
    settings: dict[str, Any] = {"lr": 3e-3}
    if optimizer == "adafactor":
        settings = {"name": "adafactor", "lr": 3e-3}
    ours(name)
    saving, loading = (run_config(parallel=parallel, optimizer=settings) for parallel in (before, after))
    wanted = run_ranks(rank_save, world_size=4, arguments=(name, tmp_path, saving))[0]
    results = run_ranks(rank_load, world_size=4, arguments=(name, tmp_path, loading))
    assemble([weights for _, weights in results], tolerance=0.0)
    for curve, _ in results:
        for mine, reference in zip(curve, wanted, strict=True):
            assert mine == pytest.approx(reference, rel=1e-4)
    assert wanted[1][0] != pytest.approx(wanted[0][0], rel=1e-3), (
        "a step must show for the comparison to mean something"
    )
