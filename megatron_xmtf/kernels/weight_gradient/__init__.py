"""Gradients of linear layers' weights: added to the fp32 main gradients by torch, or within apex's matrix product."""

from megatron_xmtf.kernels.weight_gradient.choose import WeightGradientLibrary, choose_weight_gradient

__all__ = ["WeightGradientLibrary", "choose_weight_gradient"]
