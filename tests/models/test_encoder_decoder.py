"""mT5 and T5 equal `transformers` at every layout: logits, gradients; 20 steps give the curve of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_xmtf.config import RunConfig
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRow
from megatron_xmtf.models.architecture import EncoderDecoderArchitecture, architecture_from_hf
from megatron_xmtf.models.forward import run_logits
from megatron_xmtf.parallel.launch import run_ranks
from megatron_xmtf.training.trainer import _parameters_gathered
from tests.encoder_decoder import batches_of, by_our_names, pack, row_of
from tests.encoder_decoder_engine import Shard, assemble, run_config, start_engine
from tests.layouts import PP, TP
from tests.tiny import random_examples, tiny_mt5, tiny_t5

EXAMPLES = random_examples(36, longest=10)
ROWS = pack(EXAMPLES)[:12]
# Micro-batches of two rows: one with a row of padding, and one of nothing else.
ROWS = [*ROWS, row_of({}), ROWS[0], row_of({}), row_of({})]
HELD = sorted({int(example) for row in ROWS for example in row.example_ids})
# Four micro-batches, the last two rows of padding alone.
CURVE_ROWS = ROWS[8:]
STEPS = 20
FEW_STEPS = 5
"""Of layouts that combine what others do alone; there communication is slow on two cores."""
TOLERANCE = 1e-4
VPP = "virtual_pipeline_model_parallel_size"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"parallel": {TP: 2}}),
    "PP2-inside-the-encoder": (2, {"parallel": {PP: 2, "pipeline_layers": [2, 5]}}),
    "PP2-at-the-border": (2, {"parallel": {PP: 2, "pipeline_layers": [4, 3]}}),
    "PP2-inside-the-decoder": (2, {"parallel": {PP: 2, "pipeline_layers": [5, 2]}}),
    "PP4": (4, {"parallel": {PP: 4, "pipeline_layers": [1, 3, 3, 0]}}),
    "TP2-PP2": (4, {"parallel": {TP: 2, PP: 2}}),
    "TP2-SP": (2, {"parallel": {TP: 2, "sequence_parallel": True}, "recompute": {"granularity": "selective"}}),
    "DP2": (2, {"parallel": {"overlap_grad_reduce": True}}),
    "PP2-VPP2": (2, {"parallel": {PP: 2, VPP: 2}, "recompute": {"granularity": "full", "method": "block"}}),
    "TP2-SP-PP2-distributed-optimizer": (
        4,
        {
            "parallel": {TP: 2, PP: 2, "sequence_parallel": True, "use_distributed_optimizer": True},
            "recompute": {"granularity": "full", "num_layers": 2},
        },
    ),
    "PP2-DP2-distributed-optimizer-overlap": (
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
    "reference-attention": (1, {"kernels": {"attention": "reference"}, "recompute": {"granularity": "selective"}}),
}
COMBINED = ("TP2-SP-PP2-distributed-optimizer", "reference-attention")


@cache
def theirs(name: str) -> Any:
    """Return a model of `transformers`."""
    return tiny_mt5().eval() if name == "mt5" else tiny_t5(name).eval()


@cache
def ours(name: str) -> tuple[EncoderDecoderArchitecture, dict[str, Tensor]]:
    """Return its architecture and weights by our names."""
    model = theirs(name)
    architecture = architecture_from_hf(model.config.to_dict(), head_differs=name != "1.0")
    assert isinstance(architecture, EncoderDecoderArchitecture)
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return architecture, by_our_names(weights, architecture)


@cache
def expected_logits(name: str) -> dict[int, Tensor]:
    """Logits of `transformers`, each example alone: example -> [targets, vocab], with gradient."""
    model, found = theirs(name), {}
    for number in HELD:
        inputs, targets = EXAMPLES[number]
        decoder = torch.tensor([[0, *targets[:-1]]])
        found[number] = model(input_ids=torch.tensor([inputs]), decoder_input_ids=decoder).logits[0]
    return found


@cache
def expected_gradients(name: str) -> dict[str, Tensor]:
    """Gradients of the mean over all target tokens, by autograd through `transformers`, by our names."""
    model, logits = theirs(name), expected_logits(name)
    held = [int(example) for row in ROWS for example in row.example_ids]
    losses = [
        torch.nn.functional.cross_entropy(logits[number], torch.tensor(EXAMPLES[number][1]), reduction="sum")
        for number in held
    ]
    (sum(losses) / sum(len(EXAMPLES[number][1]) for number in held)).backward()  # type: ignore[union-attr]
    state = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    return by_our_names(state, ours(name)[0])


Result = tuple[list[np.ndarray], list[Shard], list[tuple[float, float]], list[Shard]]


def rank_result(name: str, config: RunConfig, rows: list[EncoderDecoderRow], steps: int) -> Result:
    """Return this rank's logits, gradients, (loss, norm) of some steps, and the weights after them."""
    engine = start_engine(*ours(name), config)
    batches = batches_of(rows)
    with _parameters_gathered(engine.chunks, config):
        logits = run_logits(engine.chunks, batches, lambda batch, logits: logits.numpy())
    engine.forward_backward(batches)
    gradients = engine.gradients()
    held = batches_of(CURVE_ROWS)
    curve = [engine.train_step(held) for _ in range(steps)]
    with _parameters_gathered(engine.chunks, config):
        return logits, gradients, curve, engine.weights()


def steps_of(name: str, layout: str) -> int:
    """Return how many steps a curve has."""
    return STEPS if name == "mt5" and layout not in COMBINED else FEW_STEPS


@cache
def results(name: str, layout: str) -> list[Result]:
    """Run a layout once for all that is asked of it."""
    ours(name), expected_gradients(name)  # once, before the ranks are forked
    world_size, sections = LAYOUTS[layout]
    steps = steps_of(name, layout)
    return run_ranks(rank_result, world_size=world_size, arguments=(name, run_config(**sections), ROWS, steps))


def worst_difference(logits: Sequence[np.ndarray], expected: dict[int, Tensor], rows: list[EncoderDecoderRow]) -> float:
    worst = 0.0
    for number, row in enumerate(rows):
        for segment, example in enumerate(row.example_ids, start=1):
            places = np.flatnonzero(row.decoder_segment_ids == segment)
            found = logits[number // 2][number % 2][places]
            worst = max(worst, float(np.abs(found - expected[int(example)].detach().numpy()).max()))
    return worst


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


CASES = [("mt5", layout) for layout in LAYOUTS] + [("1.0", "TP1"), ("1.0", "TP2-PP2"), ("1.1", "PP2-VPP2")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_equal_transformers(name: str, layout: str) -> None:
    spread = torch.cat(list(expected_logits(name).values())).std()
    assert spread > 1.0, "the weights must be wide enough for the comparison to mean something"
    for logits, *_ in results(name, layout):
        assert worst_difference(logits, expected_logits(name), ROWS) <= TOLERANCE


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if "distributed" not in case[1]])
def test_packed_gradients_equal_transformers(name: str, layout: str) -> None:
    # The distributed optimizer leaves a rank its part of the sum alone; there the curve tells.
    found = assemble([gradients for _, gradients, *_ in results(name, layout)])
    wanted = expected_gradients(name)
    assert found.keys() == wanted.keys()
    difference, tensor = max((relative(found[key], wanted[key]), key) for key in wanted)
    assert difference <= TOLERANCE, f"{tensor}: {difference:.2e}"


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_curve_equals_one_process(name: str, layout: str) -> None:
    [(_, _, wanted, _)] = results(name, "TP1")
    assert wanted[-1][0] < 0.9 * wanted[0][0], "the model must learn for the comparison to mean something"
    for _, _, curve, _ in results(name, layout):
        assert len(curve) == steps_of(name, layout)
        for step, (mine, reference) in enumerate(zip(curve, wanted, strict=False), start=1):
            assert mine[0] == pytest.approx(reference[0], rel=TOLERANCE), f"loss of step {step}"
            assert mine[1] == pytest.approx(reference[1], rel=10 * TOLERANCE), f"gradient norm of step {step}"


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if case[1] != "TP1"])
def test_copies_on_several_ranks_stay_equal_bit_by_bit(name: str, layout: str) -> None:
    whole = assemble([weights for *_, weights in results(name, layout)], tolerance=0.0)
    assert whole.keys() == ours(name)[1].keys()


def test_megatron_core_s_gated_gelu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `kernels.activation` chooses on a GPU, as it is written: compiling it for a CPU would take a minute."""
    monkeypatch.setattr("megatron_xmtf.models.engine_settings.choose_activation", lambda *_, **__: "megatron_core")
    ours("mt5"), expected_gradients("mt5")
    with torch.compiler.set_stance("force_eager"):
        [(logits, gradients, *_)] = run_ranks(rank_result, world_size=1, arguments=("mt5", run_config(), ROWS, 0))
    assert worst_difference(logits, expected_logits("mt5"), ROWS) <= TOLERANCE
    wanted = expected_gradients("mt5")
    assert max(relative(found, wanted[key]) for key, found in assemble([gradients]).items()) <= TOLERANCE


@pytest.mark.slow
def test_our_triton_kernels_give_the_same() -> None:
    """Interpreted, where there is no GPU; attention with the learned bias, the head, what is added to the residual."""
    pytest.importorskip("triton")
    ours("mt5"), expected_gradients("mt5")
    kernels = {"kernels": dict.fromkeys(("attention", "head_loss", "bias_dropout_add"), "fused")}
    [(logits, gradients, *_)] = run_ranks(rank_result, world_size=1, arguments=("mt5", run_config(**kernels), ROWS, 0))
    assert worst_difference(logits, expected_logits("mt5"), ROWS) <= TOLERANCE
    wanted = expected_gradients("mt5")
    assert max(relative(found, wanted[key]) for key, found in assemble([gradients]).items()) <= TOLERANCE


def test_unpacked_gradients_equal_packed_ones() -> None:
    rows = [row_of({number: EXAMPLES[number]}) for row in ROWS for number in map(int, row.example_ids)]
    rows += [row_of({})] * (len(rows) % 2)
    [(_, gradients, *_)] = run_ranks(rank_result, world_size=1, arguments=("mt5", run_config(), rows, 0))
    [(_, packed, *_)] = results("mt5", "TP1")
    found, wanted = assemble([gradients]), assemble([packed])
    assert max(relative(found[key], wanted[key]) for key in wanted) <= TOLERANCE


FAULTS = ["leaked encoder", "leaked decoder", "leaked cross", "swapped buckets"]


def rank_with_fault(fault: str) -> list[np.ndarray]:
    """Break what `fault` names, and compute logits."""
    import megatron_xmtf.models.relative_bias as relative_bias

    engine = start_engine(*ours("mt5"), run_config())
    model = unwrap_model(engine.chunks[0])
    for stack in (model.encoder, model.decoder):
        right, side = stack.prepare, "decoder" if stack.is_decoder else "encoder"

        def leaking(queries: Tensor, keys: Tensor, *, causal: bool, right: Any = right, side: str = side) -> Any:
            if fault == f"leaked {'cross' if queries is not keys else side}":
                queries, keys = queries.clamp(max=1), keys.clamp(max=1)
            return right(queries, keys, causal=causal)

        stack.prepare = leaking
    if fault == "swapped buckets":
        straight = relative_bias.bias_by_distance
        relative_bias.bias_by_distance = lambda table, **kw: straight(table, **kw).flip(1)
    return run_logits(engine.chunks, batches_of(ROWS), lambda batch, logits: logits.numpy())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_seen(fault: str) -> None:
    expected_logits("mt5")
    [logits] = run_ranks(rank_with_fault, world_size=1, arguments=(fault,))
    assert worst_difference(logits, expected_logits("mt5"), ROWS) > 100 * TOLERANCE


def test_changing_one_example_changes_no_other() -> None:
    inputs, targets = EXAMPLES[0]
    held = {number: EXAMPLES[number] for number in map(int, ROWS[0].example_ids)}
    assert 0 in held and len(held) >= 2
    changed = row_of({**held, 0: ([77] * len(inputs), [78] * len(targets))})
    [(logits, *_)] = run_ranks(rank_result, world_size=1, arguments=("mt5", run_config(), [ROWS[0], changed], 0))
    before, after = logits[0]
    others = ROWS[0].decoder_segment_ids > 1
    assert np.array_equal(before[others], after[others])
    assert not np.allclose(before[ROWS[0].decoder_segment_ids == 1], after[ROWS[0].decoder_segment_ids == 1])
