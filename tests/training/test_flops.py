"""FLOPs against published runs, hand-computed sums and a brute count; peaks by device name."""

from __future__ import annotations

import pytest

from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.training.flops import model_flops_per_token, peak_tflops, useful_flops

A100_PEAK = 312e12


def architecture(layers: int, hidden_size: int, vocab_size: int) -> BloomArchitecture:
    return BloomArchitecture(
        num_layers=layers, hidden_size=hidden_size, num_attention_heads=hidden_size // 128, vocab_size=vocab_size
    )


BLOOM_560M = architecture(24, 1024, 250_880)


@pytest.mark.parametrize(
    ("rows", "layers", "hidden_size", "seconds", "published"),
    [
        # bigscience repository, train/tr11-176B-ml/chronicles-prequel.md: 384 A100, TFLOP/s with full recomputation
        (2048, 70, 14336, 104.50, 150.05),
        (2048, 70, 14336, 121.63, 128.92),
        (2048, 70, 14336, 102.03, 153.68),
        (512, 78, 13824, 35.77, 113.52),
        (1024, 78, 13824, 59.65, 136.15),
        (1536, 78, 13824, 83.11, 146.59),
        (2048, 78, 13824, 107.12, 151.64),
    ],
)
def test_flops_reproduce_the_rates_that_bloom_reported(
    rows: int, layers: int, hidden_size: int, seconds: float, published: float
) -> None:
    model = architecture(layers, hidden_size, 250_880)
    head = 6 * 250_880 * hidden_size  # the output layer is not computed again
    body = model_flops_per_token(model, sequence_length=2048) - head
    # Recomputation adds one more forward pass to forward and backward, 4/3 of the body.
    hardware_flops = (body * 4 / 3 + head) * rows * 2048
    assert hardware_flops / seconds / 384 / 1e12 == pytest.approx(published, rel=1e-3)


def test_the_rate_of_bloom_in_model_flops() -> None:
    flops = model_flops_per_token(architecture(70, 14336, 250_880), sequence_length=2048) * 2048 * 2048
    assert flops / 104.50 / 384 / 1e12 == pytest.approx(113.1, abs=0.1)


@pytest.mark.parametrize(
    ("layers", "hidden_size", "rows", "gpus", "seconds", "published_percent", "tolerance"),
    [
        # Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 5
        (48, 6144, 4, 8, 1.10, 41.5, 0.3),  # the time has three digits only
        (96, 12288, 64, 64, 13.75, 51.4, 0.1),
        (105, 20480, 280, 280, 37.83, 56.0, 0.1),
        (128, 25600, 512, 512, 71.49, 56.3, 0.1),
    ],
)
def test_flops_reproduce_published_utilisation(
    layers: int, hidden_size: int, rows: int, gpus: int, seconds: float, published_percent: float, tolerance: float
) -> None:
    per_token = model_flops_per_token(architecture(layers, hidden_size, 51_200), sequence_length=2048)
    percent = 100 * per_token * rows * 2048 / seconds / gpus / A100_PEAK
    assert percent == pytest.approx(published_percent, abs=tolerance)


def test_flops_count_every_matrix_once_forward_and_twice_backward() -> None:
    # 2 FLOPs a weight and token forward: QKV 3hh, projection hh, feed-forward 8hh, head Vh; attention 4sh a layer.
    hidden, layers, vocab, sequence = 64, 3, 256, 32
    forward = layers * (2 * 12 * hidden**2 + 4 * sequence * hidden) + 2 * vocab * hidden
    found = model_flops_per_token(architecture(layers, hidden, vocab), sequence_length=sequence)
    assert found == pytest.approx(3 * forward)


def test_bloom_560m_by_hand() -> None:
    layers = 1_811_939_328  # 72 l h^2 = 72 * 24 * 1024 * 1024
    attention = 603_979_776  # 12 l h s = 12 * 24 * 1024 * 2048
    head = 1_541_406_720  # 6 h V = 6 * 1024 * 250880
    assert model_flops_per_token(BLOOM_560M, sequence_length=2048) == layers + attention + head == 3_957_325_824
    # A row of segments of 1,500 and 500 tokens and 48 of padding, 300 targets.
    pairs = 1_125_750 + 125_250  # 1500 * 1501 / 2, 500 * 501 / 2
    useful = useful_flops(BLOOM_560M, tokens=2000, attention_pairs=pairs, target_tokens=300)
    assert useful == layers * 2000 + 12 * 24 * 1024 * pairs + head * 300 == 4_455_235_584_000


def test_useful_flops_equal_a_count_of_every_product() -> None:
    """Loops over tokens, keys and weights of a small model; nothing of the formula is used."""
    hidden, layers, vocab, segments, targets = 8, 3, 40, [5, 3], [2, 1]
    model = BloomArchitecture(hidden_size=hidden, num_layers=layers, num_attention_heads=2, vocab_size=vocab)
    matrices = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    forward = 0
    for length, with_loss in zip(segments, targets, strict=True):
        for query in range(length):
            for _ in range(layers):
                forward += sum(2 * rows * columns for rows, columns in matrices)
                for _ in range(query + 1):
                    forward += 2 * hidden + 2 * hidden  # score, value
        forward += with_loss * 2 * hidden * vocab
    pairs = sum(query + 1 for length in segments for query in range(length))
    assert useful_flops(model, tokens=8, attention_pairs=pairs, target_tokens=3) == 3 * forward


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1060", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name, precision="bf16") == peak
    assert peak_tflops(name, precision="fp32") is None
