"""LayerNorm that Megatron-Core's sequence parallelism knows of."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["LayerNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, built as Megatron-Core builds norms, its parameters marked for sequence parallelism.

    Without the mark each tensor-parallel rank would keep the gradient of its own part of the sequence, and the
    copies would drift apart.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
