"""AdamW's update: torch's fused kernel, or the fused Adam of Transformer Engine or of NVIDIA's apex."""

from megatron_xmtf.kernels.adam.choose import AdamLibrary, choose_adam, import_fused_adam

__all__ = ["AdamLibrary", "choose_adam", "import_fused_adam"]
