"""Published runs of BigScience on Jean Zay's A100-80GB nodes: layout, seconds a step, memory, TFLOP/s.

Source:  bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md (2022-02-25 to 02-28, after the nodes'
         PCIe was mended: every row with a time), README.md (BLOOM's first steps) and reshaping-log.md (192 and 288
         GPUs). Sequences of 2,048 tokens, 250,880 words, whole
         layers recomputed, dropout 0.1. Until 02-27 fp16 with ZeRO-1, from 02-28 on bf16 with BF16_Optimizer and
         embedding and head counted as layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xmtf.config.parallel import ParallelConfig, RecomputeConfig
from megatron_xmtf.models.architecture import BloomArchitecture
from megatron_xmtf.planning.engine import ENGINES
from megatron_xmtf.planning.layout import Layout


@dataclass(frozen=True)
class PublishedRun:
    """One row of those tables; None where a column is empty."""

    name: str
    hidden: int
    layers: int
    heads: int
    gpus: int
    tp: int
    pp: int
    mbs: int
    gbs: int
    seconds: float | None
    tflops: float | None
    memory_gib: float | None
    engine: str = "deepspeed_bf16"

    @property
    def architecture(self) -> BloomArchitecture:
        return BloomArchitecture(
            hidden_size=self.hidden, num_layers=self.layers, num_attention_heads=self.heads, vocab_size=250_880
        )

    @property
    def parallel(self) -> ParallelConfig:
        sizes = {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp}
        if self.pp > 1 and self.engine in ("deepspeed_bf16", FP16_BALANCED):
            counted = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
            return ParallelConfig(**sizes, **dict.fromkeys(counted, True))
        if self.layers % self.pp:
            # DeepSpeed rounds up, and the last stage has what is left: 78 layers on 12 stages, 11 x 7 and 1.
            most = -(-self.layers // self.pp)
            return ParallelConfig(
                **sizes,
                num_layers_in_first_pipeline_stage=most,
                num_layers_in_last_pipeline_stage=self.layers - most * (self.pp - 1),
            )
        return ParallelConfig(**sizes)

    @property
    def layout(self) -> Layout:
        return Layout(
            gpus=self.gpus,
            parallel=self.parallel,
            lengths=2048,
            micro_batch_size=self.mbs,
            global_batch_size=self.gbs,
            recompute=RecomputeConfig(granularity="full"),
            precision="bf16" if self.engine == "deepspeed_bf16" else "fp16",
            attention="unfused",
            dropout=True,
            engine=ENGINES[self.engine.partition(",")[0]],
        )


FP16 = "deepspeed_fp16_zero1"
FP16_BALANCED = "deepspeed_fp16_zero1, balanced"
"""With embedding and head counted as layers, as all rows in bf16."""
BLOOM = PublishedRun("BLOOM", 14336, 70, 112, 384, 4, 12, 2, 2048, 104.50, 150.05, 59)
BLOOMZ = PublishedRun("BLOOMZ's layout", 14336, 70, 112, 288, 1, 72, 1, 2048, 140.37, 148.94, None)

RUNS = [
    BLOOM,
    BLOOMZ,
    PublishedRun("176B 64 heads", 14336, 70, 64, 384, 4, 12, 2, 2048, 102.03, 153.68, 59),
    PublishedRun("176B 128 heads", 14336, 70, 128, 384, 4, 12, 2, 2048, 105.89, 148.08, 60),
    PublishedRun("176B 64 heads MBS4", 14336, 70, 64, 384, 4, 12, 4, 2048, 102.27, 153.33, 73),
    PublishedRun("176B TP8", 14336, 70, 64, 384, 8, 12, 2, 2048, 121.63, 128.92, 40),
    PublishedRun("176B on 192, TP2 PP24", 14336, 70, 112, 192, 2, 24, 1, 2048, 199.82, 156.95, None),
    PublishedRun("176B on 192, TP4 PP24", 14336, 70, 112, 192, 4, 24, 1, 2048, 220.30, 142.35, None),
    PublishedRun("176B on 288, TP2 PP36", 14336, 70, 112, 288, 2, 36, 1, 2048, 141.22, 148.04, None),
    PublishedRun("176B on 288, TP4 PP36", 14336, 70, 112, 288, 4, 36, 1, 2048, 155.71, 134.26, None),
    PublishedRun("178B 64 heads", 13312, 82, 64, 384, 4, 12, 2, 2048, 104.45, 151.71, 63),
    PublishedRun("178B 128 heads", 13312, 82, 128, 384, 4, 12, 2, 2048, 108.78, 145.68, 60),
    PublishedRun("178B MBS4", 13312, 82, 64, 384, 4, 12, 4, 2048, 104.82, 151.18, 74),
    PublishedRun("178B TP8 MBS4", 13312, 82, 64, 384, 8, 12, 4, 2048, 111.79, 141.76, 52),
    PublishedRun("195B 64 heads", 12288, 106, 64, 384, 4, 12, 2, 2048, 116.54, 149.75, 67),
    PublishedRun("195B 96 heads", 12288, 106, 96, 384, 4, 12, 2, 2048, 118.79, 146.90, 65),
    PublishedRun("195B 128 heads", 12288, 106, 128, 384, 4, 12, 2, 2048, 121.42, 143.73, 67),
    PublishedRun("195B 96 heads MBS4", 12288, 106, 96, 384, 4, 12, 4, 2048, 120.34, 145.01, 79),
    PublishedRun("203B", 13312, 94, 128, 384, 4, 12, 2, 2048, 124.10, 146.12, 67),
    PublishedRun("184B TP8 PP6 MBS2", 12288, 100, 64, 384, 8, 6, 2, 2048, 139.72, 117.91, 61),
    PublishedRun("184B TP8 PP6 MBS4", 12288, 100, 64, 384, 8, 6, 4, 2048, 120.96, 136.20, 72),
    PublishedRun("182B GBS512", 13824, 78, 96, 384, 4, 12, 2, 512, 35.77, 113.52, None, FP16),
    PublishedRun("182B GBS1024", 13824, 78, 96, 384, 4, 12, 2, 1024, 59.65, 136.15, None, FP16),
    PublishedRun("182B GBS1536", 13824, 78, 96, 384, 4, 12, 2, 1536, 83.11, 146.59, None, FP16),
    PublishedRun("182B GBS2048", 13824, 78, 96, 384, 4, 12, 2, 2048, 107.12, 151.64, 48, FP16),
    PublishedRun("182B 64 heads", 13824, 78, 64, 384, 4, 12, 2, 2048, 103.51, 156.92, 48, FP16),
    PublishedRun("182B 128 heads", 13824, 78, 128, 384, 4, 12, 2, 2048, 147.41, 110.19, None, FP16),
    PublishedRun("182B 128 heads MBS4", 13824, 78, 128, 384, 4, 12, 4, 2048, 153.90, 105.54, None, FP16),
    PublishedRun("182B 128 heads TP8 PP6 MBS4", 13824, 78, 128, 384, 8, 6, 4, 2048, 156.84, 103.56, None, FP16),
    PublishedRun("182B MBS4", 13824, 78, 96, 384, 4, 12, 4, 2048, 110.31, 147.25, None, FP16),
    PublishedRun("181B TP4 PP12 MBS2", 14336, 72, 64, 384, 4, 12, 2, 2048, 110.48, 145.92, 44, FP16),
    PublishedRun("181B TP4 PP12 MBS4", 14336, 72, 64, 384, 4, 12, 4, 2048, 111.89, 144.08, 60, FP16),
    PublishedRun("181B TP4 PP6 MBS2", 14336, 72, 64, 384, 4, 6, 2, 2048, 111.71, 144.31, 57, FP16),
    PublishedRun("181B TP4 PP6 MBS4", 14336, 72, 64, 384, 4, 6, 4, 2048, 117.11, 137.66, 75, FP16),
    PublishedRun("181B TP2 PP12 MBS2", 14336, 72, 64, 384, 2, 12, 2, 2048, 112.50, 143.30, 63, FP16),
    PublishedRun("181B TP2 PP24 MBS1", 14336, 72, 64, 384, 2, 24, 1, 2048, 119.53, 134.88, 44, FP16),
    PublishedRun("181B TP2 PP24 MBS2", 14336, 72, 64, 384, 2, 24, 2, 2048, 122.75, 131.33, 53, FP16),
    PublishedRun("181B TP8 PP6 MBS4", 14336, 72, 64, 384, 8, 6, 4, 2048, 114.11, 141.27, 55, FP16),
    PublishedRun("181B TP8 PP12 MBS4", 14336, 72, 64, 384, 8, 12, 4, 2048, 117.07, 137.70, 49, FP16),
    PublishedRun("181B TP8 PP12 MBS2", 14336, 72, 64, 384, 8, 12, 2, 2048, 128.82, 125.15, None, FP16),
    PublishedRun("177B TP1 PP48", 12288, 96, 96, 384, 1, 48, 1, 2048, 142.17, 111.30, 58, FP16),
    PublishedRun("BLOOM, first steps", 14336, 70, 112, 384, 4, 12, 2, 16, 15.23, 8.04, None),
    PublishedRun("181B TP4 PP12 MBS2, another day", 14336, 72, 64, 384, 4, 12, 2, 2048, 110.42, 146.00, None, FP16),
    PublishedRun("181B TP4 PP12 MBS2, third", 14336, 72, 64, 384, 4, 12, 2, 2048, 113.54, 141.99, 38, FP16),
    PublishedRun("181B 128 heads", 14336, 72, 128, 384, 4, 12, 2, 2048, 114.02, 141.39, None, FP16),
    PublishedRun("181B 128 heads MBS4", 14336, 72, 128, 384, 4, 12, 4, 2048, 137.53, 117.23, None, FP16),
    PublishedRun("181B TP4 PP24 MBS1", 14336, 72, 64, 384, 4, 24, 1, 2048, 130.60, 123.44, None, FP16),
    PublishedRun("181B TP8 PP12 MBS2 GBS1568", 14336, 72, 64, 384, 8, 12, 2, 1568, 99.93, 123.51, None, FP16),
    PublishedRun("181B TP8 PP12 MBS4 GBS1568", 14336, 72, 64, 384, 8, 12, 4, 1568, 92.75, 133.08, None, FP16),
    PublishedRun("181B TP8 PP8 MBS4", 14336, 72, 64, 384, 8, 8, 4, 2016, 113.16, 140.24, 52, FP16),
    PublishedRun("181B TP8 PP6 MBS4, another day", 14336, 72, 64, 384, 8, 6, 4, 2048, 113.95, 141.47, None, FP16),
    PublishedRun("181B TP8 PP6 MBS4 128 heads", 14336, 72, 128, 384, 8, 6, 4, 2048, 116.06, 138.90, None, FP16),
    PublishedRun("181B TP8 PP6 MBS4 GBS1568", 14336, 72, 64, 384, 8, 6, 4, 1568, 113.01, 109.22, 56, FP16),
    PublishedRun("181B TP8 PP6 MBS6", 14336, 72, 64, 384, 8, 6, 6, 2016, 123.57, 128.43, 66, FP16),
    PublishedRun("181B TP8 PP4 MBS2", 14336, 72, 64, 384, 8, 4, 2, 2016, 125.52, 126.43, 53, FP16),
    PublishedRun("181B TP8 PP4 MBS4", 14336, 72, 64, 384, 8, 4, 4, 2016, 114.81, 138.22, 59, FP16),
    PublishedRun("181B TP8 PP2 MBS1", 14336, 72, 64, 384, 8, 2, 1, 2016, 145.45, 109.11, 65, FP16),
    PublishedRun("181B TP8 PP2 MBS2", 14336, 72, 64, 384, 8, 2, 2, 2016, 136.13, 116.58, 76, FP16),
    PublishedRun("182B 64 heads MBS1", 13824, 78, 64, 384, 4, 12, 1, 2048, 148.24, 109.57, None, FP16),
    PublishedRun("182B 64 heads MBS4", 13824, 78, 64, 384, 4, 12, 4, 2048, 106.72, 152.21, None, FP16),
    PublishedRun("182B TP8 PP6 MBS2", 13824, 78, 96, 384, 8, 6, 2, 2048, 133.57, 121.61, None, FP16),
    PublishedRun("182B TP8 PP6 MBS4", 13824, 78, 96, 384, 8, 6, 4, 2048, 118.12, 137.51, None, FP16),
    PublishedRun("182B TP8 PP6 MBS4, another day", 13824, 78, 96, 384, 8, 6, 4, 2048, 118.24, 137.38, 59, FP16),
    PublishedRun("182B TP4 PP6 MBS4", 13824, 78, 96, 384, 4, 6, 4, 2048, 115.55, 140.57, 75, FP16),
    PublishedRun("182B of 84 layers MBS2", 13312, 84, 64, 384, 4, 12, 2, 2048, 103.82, 156.46, None, FP16),
    PublishedRun("182B of 84 layers MBS4", 13312, 84, 64, 384, 4, 12, 4, 2048, 113.21, 143.34, None, FP16),
    PublishedRun("182B of 84 layers TP8 PP6 MBS2", 13312, 84, 64, 384, 8, 6, 2, 2048, 129.61, 125.21, None, FP16),
    PublishedRun("178B 104 heads", 13312, 82, 104, 384, 4, 12, 2, 2048, 123.71, 128.10, 62),
    PublishedRun("195B fp16 64 heads", 12288, 106, 64, 384, 4, 12, 2, 2048, 110.96, 157.27, None, FP16_BALANCED),
    PublishedRun("195B fp16 96 heads", 12288, 106, 96, 384, 4, 12, 2, 2048, 112.69, 154.86, 44, FP16_BALANCED),
]
"""Rows whose seconds can be compared with each other: the second or third step after a start, same hardware."""

FIRST_STEPS = [
    # Both steps of this log are the first after a start; of the other logs the first is 22 to 63 s slower.
    PublishedRun("176B on 192, TP4 PP12", 14336, 70, 112, 192, 4, 12, 2, 2048, 215.82, 145.31, None),
    PublishedRun("176B on 192, TP4 PP12 MBS1", 14336, 70, 112, 192, 4, 12, 1, 2048, 234.72, 133.61, None),
]
"""Rows that are slow for a reason which is no layout's."""

MEMORY_RUNS = [
    # Of 02-17, whose step times are no neighbours of others; more of these days in `published_ratios.py`.
    PublishedRun("200B DP1", 14400, 80, 96, 80, 8, 10, 1, 2048, None, None, 73, FP16),
    PublishedRun("200B DP2", 14400, 80, 96, 160, 8, 10, 1, 2048, None, None, 51, FP16),
    PublishedRun("20B, one node", 14400, 8, 32, 8, 8, 1, 1, 2048, None, None, 67, FP16),
]

OUT_OF_MEMORY = [
    PublishedRun("181B TP8 PP1", 14336, 72, 64, 384, 8, 1, 1, 2016, None, None, None, FP16),
    PublishedRun("181B TP2 PP6 MBS1", 14336, 72, 64, 384, 2, 6, 1, 2048, None, None, None, FP16),
    PublishedRun("181B TP2 PP6 MBS2", 14336, 72, 64, 384, 2, 6, 2, 2048, None, None, None, FP16),
    PublishedRun("184B TP4 PP6 MBS1", 12288, 100, 64, 384, 4, 6, 1, 2048, None, None, None),
    PublishedRun("184B TP4 PP6 MBS2", 12288, 100, 64, 384, 4, 6, 2, 2048, None, None, None),
    PublishedRun("206B TP4 PP12 MBS2", 14336, 82, 128, 384, 4, 12, 2, 2048, None, None, None),
]
