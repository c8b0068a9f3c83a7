"""Bias and tanh-GELU of the feed-forward layer, plain or gated: torch's, or Megatron-Core's compiled ones."""

from megatron_xmtf.kernels.activation.choose import ActivationLibrary, choose_activation

__all__ = ["ActivationLibrary", "choose_activation"]
