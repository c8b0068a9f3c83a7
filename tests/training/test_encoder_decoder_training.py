"""An encoder-decoder through the whole trainer: import, rows of two sides, curves, resume, sizes, FLOPs, drift."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model
from transformers import MT5ForConditionalGeneration

from megatron_xmtf.config import ParallelConfig, RunConfig, config_from_mapping
from megatron_xmtf.config.row_lengths import EncoderDecoderLengths
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError, ReplicaDriftError
from megatron_xmtf.models.architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.stages import split_by_cost, stage_layers
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.parallel.topology import initialize_parallel
from megatron_xmtf.training.dry_run import dry_run, size_stages
from megatron_xmtf.training.encoder_decoder_flops import model_flops_per_row, useful_flops_of_two_sides
from megatron_xmtf.training.metrics import StepCounts, StepRates
from megatron_xmtf.training.prepare import PreparedRun, prepare_run
from megatron_xmtf.training.replica_check import check_replicas
from megatron_xmtf.training.trainer import Trainer, train_rank
from tests.encoder_decoder import batches_of, by_our_names, pack, shards
from tests.layouts import PP, TP
from tests.tiny import random_examples, write_records, write_tiny_mt5

STEPS = 8
VPP = "virtual_pipeline_model_parallel_size"
MT5_SMALL = EncoderDecoderArchitecture(
    hidden_size=512,
    num_encoder_layers=8,
    num_decoder_layers=8,
    num_attention_heads=6,
    head_dim=64,
    ffn_hidden_size=1024,
    vocab_size=250_112,
)


@pytest.fixture(scope="module")
def mt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny mT5, and beside it a preprocessed dataset."""
    directory = tmp_path_factory.mktemp("mt5")
    write_tiny_mt5(directory / "hf")
    write_records(directory / "tiny.jsonl", 300)
    preprocess(
        [directory / "tiny.jsonl"],
        tokenizer=Tokenizer.load(directory / "hf"),
        output_prefix=directory / "tiny",
        workers=1,
    )
    return directory


@pytest.fixture
def run_config(mt5: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a small RunConfig; keywords replace whole sections."""

    def make(**sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": str(mt5 / "hf"),
            "output": str(tmp_path / "run"),
            "data": {"train": [{"prefix": str(mt5 / "tiny")}], "validation": [{"prefix": str(mt5 / "tiny")}]},
            "batch": {"micro_batch_size": 2, "global_batch_size": 8, "encoder_length": 64, "decoder_length": 32},
            "schedule": {"train_steps": STEPS},
            "optimizer": {"lr": 1e-3},
            "evaluation": {"interval": 4, "rows": 6},
            "precision": "fp32",
            "logging": {"log_interval": 4, "replica_check_interval": 2},
        }
        values.update(sections)
        return config_from_mapping(values, RunConfig, source="test")

    return make


def train(config: RunConfig, world_size: int) -> list[dict[str, Any]]:
    """Train as the command does and return the lines of metrics.jsonl."""
    prepared = prepare_run(config, world_size=world_size)
    run_ranks(train_rank, world_size=world_size, arguments=(prepared,))
    lines = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Return what does not depend on the clock."""
    return {
        key: value
        for key, value in line.items()
        if key in ("loss", "grad_norm", "tokens", "target_tokens", "fill_fraction") or "loss/" in key
    }


@cache
def _remembered() -> dict[str, Any]:
    return {}


@pytest.fixture
def reference(run_config: Callable[..., RunConfig]) -> list[dict[str, Any]]:
    """The run in one process, once for all tests."""
    kept = _remembered()
    if "reference" not in kept:
        kept["reference"] = train(run_config(), 1)
    return kept["reference"]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2-SP-PP2": (4, {"parallel": {TP: 2, PP: 2, "sequence_parallel": True}}),
    "PP2-DP2-overlap": (
        4,
        {
            "parallel": {
                PP: 2,
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            }
        },
    ),
    "PP2-VPP2": (2, {"parallel": {PP: 2, VPP: 2}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_of_the_trainer_equals_that_of_one_process(
    name: str, reference: list[dict[str, Any]], run_config: Callable[..., RunConfig]
) -> None:
    world_size, sections = LAYOUTS[name]
    found = train(run_config(**sections), world_size)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert "loss/tiny/fr" in found[3] and "train_loss/tiny/en" in found[3]
    for ours, wanted in zip(map(numbers, found), map(numbers, reference), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)
    assert reference[-1]["loss"] < 0.95 * reference[0]["loss"]


def test_a_resumed_run_is_the_uninterrupted_one(
    reference: list[dict[str, Any]], run_config: Callable[..., RunConfig]
) -> None:
    train(run_config(schedule={"train_steps": 4}), 1)
    found = train(run_config(schedule={"train_steps": STEPS}, parallel={TP: 2, PP: 2}), 4)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for ours, wanted in zip(map(numbers, found), map(numbers, reference), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)


def rank_with_drift(prepared: PreparedRun) -> None:
    trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    check_replicas(trainer.chunks)
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            unwrap_model(trainer.chunks[0]).encoder.relative_attention_bias.weight[3, 1] += 1e-3
    check_replicas(trainer.chunks)


def test_a_drifted_table_is_named(run_config: Callable[..., RunConfig]) -> None:
    prepared = prepare_run(run_config(parallel={PP: 2}), world_size=2)
    with pytest.raises(ReplicaDriftError, match=r"encoder\.relative_attention_bias\.weight over pipeline stages"):
        run_ranks(rank_with_drift, world_size=2, arguments=(prepared,))


def rank_main_parameters(prepared: PreparedRun, whole: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of main parameters from the fp32 weights, and of the rounded weights."""
    trainer = Trainer(prepared, initialize_parallel(prepared.config.parallel, seed=1))
    found = {"main": 0.0, "rounded": 0.0}
    for name, _, offset, part, parameter in shards(trainer.chunks):
        begin = (part.data_ptr() - parameter.data_ptr()) // part.element_size()
        main = parameter.main_param.reshape(-1)[begin : begin + part.numel()].view(part.shape)
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        found["main"] = max(found["main"], float((main - whole[name][place]).abs().max()))
        found["rounded"] = max(found["rounded"], float((part.float() - whole[name][place]).abs().max()))
    return found


def test_a_half_precision_run_starts_from_unrounded_weights(mt5: Path, run_config: Callable[..., RunConfig]) -> None:
    prepared = prepare_run(run_config(precision="bf16", parallel={TP: 2}), world_size=2)
    assert isinstance(prepared.architecture, EncoderDecoderArchitecture)
    state = MT5ForConditionalGeneration.from_pretrained(mt5 / "hf", dtype=torch.float32).state_dict()
    whole = by_our_names(state, prepared.architecture)
    for found in run_ranks(rank_main_parameters, world_size=2, arguments=(prepared, whole)):
        assert found["main"] == 0.0 < found["rounded"]


# Sizes


def test_a_dry_run_counts_every_parameter_once(run_config: Callable[..., RunConfig]) -> None:
    found = dry_run(run_config(parallel={TP: 2, PP: 4, "pipeline_layers": [2, 2, 2, 1]}), world_size=8)
    assert [stage.stages for stage in found.stages] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert found.training_tokens == STEPS * 8 * (64 + 32)


@pytest.mark.parametrize("changes", [{}, {"tied_head": True, "scaled_head": True, "feed_forward": "relu"}])
@pytest.mark.parametrize("parallel", [{}, {TP: 2, PP: 4}, {PP: 4, VPP: 2}])
def test_the_ranks_hold_the_model_that_transformers_has(
    changes: dict[str, Any], parallel: dict[str, Any], run_config: Callable[..., RunConfig]
) -> None:
    from dataclasses import replace

    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

    architecture = replace(MT5_SMALL, **changes)
    sizes = {"vocab_size": 250_112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    with torch.device("meta"):
        if changes:
            theirs: Any = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="relu"))
            wanted = sum(parameter.numel() for parameter in theirs.parameters())
        else:
            theirs = MT5ForConditionalGeneration(MT5Config(**sizes))
            tied = (
                theirs.lm_head.weight is theirs.shared.weight
            )  # transformers 5 ties what the published model does not
            wanted = sum(parameter.numel() for parameter in theirs.parameters()) + tied * theirs.shared.weight.numel()
    _, found = size_stages(architecture, run_config(parallel=parallel), world_size=8)
    assert found == wanted == architecture.parameter_count


# Stages


@pytest.mark.parametrize(
    ("costs", "extra", "parts", "wanted"),
    [
        ([4.0] * 4 + [1.0] * 4, 2.0, 2, [3, 5]),
        ([1.0] * 8, 0.0, 4, [2, 2, 2, 2]),
        ([1.0] * 4, 100.0, 4, [1, 1, 2, 0]),
        ([5.0], 0.0, 1, [1]),
    ],
)
def test_stages_are_cut_where_the_dearest_is_cheapest(
    costs: list[float], extra: float, parts: int, wanted: list[int]
) -> None:
    from itertools import combinations_with_replacement

    found = split_by_cost(costs, last_extra=extra, parts=parts)

    def dearest(ends: tuple[int, ...]) -> float:
        cuts = [0, *ends, len(costs)]
        sums = [sum(costs[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        return max([*sums[:-1], sums[-1] + extra])

    best = min(dearest(ends) for ends in combinations_with_replacement(range(len(costs) + 1), parts - 1))
    ends = tuple(sum(found[: part + 1]) for part in range(parts - 1))
    assert sum(found) == len(costs) and dearest(ends) == pytest.approx(best)
    assert found == wanted or dearest(ends) == dearest(tuple(sum(wanted[: part + 1]) for part in range(parts - 1)))


def test_a_large_model_is_cut_as_its_docstring_says() -> None:
    from dataclasses import replace

    large = replace(
        MT5_SMALL,
        hidden_size=1024,
        num_encoder_layers=24,
        num_decoder_layers=24,
        num_attention_heads=16,
        ffn_hidden_size=2816,
    )
    split = stage_layers(large, ParallelConfig(**{PP: 4}), encoder_length=1024, decoder_length=256)
    assert [[len(layers) for layers in stage] for stage in split] == [[9], [10], [16], [13]]


def test_a_given_split_is_obeyed_in_the_order_of_the_pipeline() -> None:
    parallel = ParallelConfig(**{PP: 2, VPP: 2, "pipeline_layers": [3, 5, 7, 1]})
    MT5_SMALL.check_split(parallel)
    assert stage_layers(MT5_SMALL, parallel) == [[range(0, 3), range(8, 15)], [range(3, 8), range(15, 16)]]


def test_splits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="pipeline_layers has 3 numbers"):
        ParallelConfig(**{PP: 2, "pipeline_layers": [1, 2, 3]})
    with pytest.raises(ConfigError, match=r"adds up to 15, the model has 8 \+ 8 = 16"):
        MT5_SMALL.check_split(ParallelConfig(**{PP: 2, "pipeline_layers": [8, 7]}))
    with pytest.raises(ConfigError, match="is for decoder models"):
        MT5_SMALL.check_split(ParallelConfig(**{PP: 2, "num_layers_in_first_pipeline_stage": 4}))


# FLOPs


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import MT5Config, MT5ForConditionalGeneration

    sizes = {"vocab_size": 640, "d_model": 96, "d_kv": 20, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2}
    # Its fused attention on a CPU would not be counted.
    model = MT5ForConditionalGeneration._from_config(
        MT5Config(**sizes, num_heads=4), attn_implementation="eager"
    ).eval()
    architecture = EncoderDecoderArchitecture(
        hidden_size=96,
        num_encoder_layers=3,
        num_decoder_layers=2,
        num_attention_heads=4,
        head_dim=20,
        ffn_hidden_size=56,
        vocab_size=640,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, 48, dtype=torch.long), decoder_input_ids=torch.ones(1, 16, dtype=torch.long))
    ours = model_flops_per_row(architecture, encoder_length=48, decoder_length=16)
    assert ours == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)
    # A row without padding, one segment a side, every pair seen: useful is model.
    useful = useful_flops_of_two_sides(
        architecture,
        encoder_tokens=48,
        target_tokens=16,
        encoder_pairs=48 * 48,
        decoder_pairs=16 * 16,
        cross_pairs=48 * 16,
    )
    assert useful == pytest.approx(ours)


def test_counts_and_rates_of_two_sided_rows() -> None:
    examples = random_examples(9, longest=10)
    batches = batches_of(pack(examples)[:2])
    held = [int(example) for batch in batches for row in batch.rows for example in row.example_ids]
    counts = StepCounts.of(batches)
    pairs = [(len(examples[number][0]), len(examples[number][1])) for number in held]
    assert counts.encoder_pairs == sum(e * e for e, _ in pairs)
    assert counts.cross_pairs == sum(e * d for e, d in pairs)
    assert counts.attention_pairs == sum(d * (d + 1) // 2 for _, d in pairs)
    assert counts.tokens - counts.target_tokens == sum(e for e, _ in pairs)
    rates = StepRates(MT5_SMALL, EncoderDecoderLengths(24, 16), world_size=2, precision="fp32").of(counts, seconds=2.0)
    assert rates["fill_fraction"] == counts.tokens / (2 * 40)
    per_row = model_flops_per_row(MT5_SMALL, encoder_length=24, decoder_length=16)
    assert rates["model_tflops_per_gpu"] == pytest.approx(2 * per_row / 2.0 / 2 / 1e12)
