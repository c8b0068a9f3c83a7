"""What a layer adds to its residual: the projection with its bias, after dropout; plain torch or one Triton kernel."""

from megatron_xmtf.kernels.bias_dropout_add.choose import BiasDropoutAdd, choose_bias_dropout_add

__all__ = ["BiasDropoutAdd", "choose_bias_dropout_add"]
