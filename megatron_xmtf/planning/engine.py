"""What a training engine keeps beside the weights, and what it sends: ours, and those that published rows ran on.

    bytes a parameter        weights  gradients  once a step  optimizer      per micro-batch   gradients sent
    megatron_core                  2          4            0  12  (/ dp)     10, or 8 fused    reduce-scatter, fp32
    deepspeed_bf16                 2     4 + 2             0  12 / dp        18                all-reduce, fp32
                                                  and 4 of the largest parameter, while it is made fp32
    deepspeed_fp16_zero1           2          2            0  16 / dp         6                as all-reduce, fp16
    deepspeed_fp16                 2          2            8  12              6                all-reduce, fp16

"Per micro-batch" is memory traffic: what adding up gradients reads and writes. In fp32, ours has 4, 4 and 8 bytes.

ZeRO-1 reduces a slice of a bucket after the other to the rank that owns it (`average_tensor`), half the bytes of an
all-reduce; by the published table of batch sizes that takes as long as one (constant part of a step 3.9 s; all-reduced
4.4 s, with half the bytes 3.1 s), and it is counted as one.

Source:  Megatron-Core, DistributedDataParallel, DistributedOptimizer and tensor_parallel/layers.py
         (`LinearWithGradAccumulationAndAsyncCommunication`; sums beside products need CUDA_DEVICE_MAX_CONNECTIONS=1,
         which a run sets); DeepSpeed 0.6, runtime/bf16_optimizer.py (gradients in fp32 that are not sharded, each
         micro-batch's in bf16 converted and added), runtime/engine.py (`buffered_allreduce_fallback`),
         runtime/fp16/fused_optimizer.py (`_flatten_dense_tensors` of gradients that are converted to fp32 first: two
         copies), stage_1_and_2.py (fp32 weights, moments and gradients in shards),
         runtime/pipe/schedule.py (`TrainSchedule`: send, then receive, blocking; simulated, its steps take what the
         closed formula says). bigscience-workshop/Megatron-DeepSpeed, megatron/model/transformer.py @ 4989bcd (ALiBi is
         expanded into the result that `baddbmm` adds to).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ENGINES", "MEGATRON_CORE", "Engine"]


@dataclass(frozen=True)
class Engine:
    """Bytes a parameter of a mixed-precision run with Adam."""

    name: str
    gradient_bytes: float
    """Held from step to step."""
    step_bytes: float
    """Held while the optimizer works, on top."""
    optimizer_bytes: float
    """fp32 weights and moments, and what is kept with them."""
    always_sharded: bool
    """The optimizer's bytes are divided by the data-parallel size; ours only where the run asks for it."""
    accumulate_bytes: float
    """Memory traffic of adding up one micro-batch's gradients."""
    sent_bytes: float
    """Of one gradient as it is sent."""
    reduces_all: bool
    """Gradients are all-reduced even where the optimizer is sharded."""
    turns_per_border: int
    """Hand-overs at a border of two stages, a micro-batch and chunk: 1, both directions at once; 2, in turn."""
    splits_pipeline: bool
    """Tensor-parallel ranks send a part each of what goes to the next stage."""
    position_bytes: float
    """Memory traffic a score and forward pass of ALiBi in unfused attention: expanded (2), read by the product (2)."""
    converts_gradients: bool
    """A micro-batch's gradients are made fp32, one parameter at a time, before they are added."""
    keeps_logits: bool
    """The whole logits are kept, in half precision, in fp32 and their gradient; False: our chunked head."""
    overlaps_sums: bool
    """A linear layer's backward pass sums the gradient of what came in while it computes that of its weights."""


MEGATRON_CORE = Engine("megatron_core", 4, 0, 12, False, 10, 4, False, 1, False, 0, False, False, True)
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        MEGATRON_CORE,
        Engine("deepspeed_bf16", 6, 0, 12, True, 18, 4, True, 2, True, 4, True, True, False),
        Engine("deepspeed_fp16_zero1", 2, 0, 16, True, 6, 2, True, 2, True, 4, False, True, False),
        Engine("deepspeed_fp16", 2, 8, 12, False, 6, 2, True, 2, True, 4, False, True, False),
    )
}
"""Engines by name."""
