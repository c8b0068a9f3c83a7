"""Cross-entropy over a large, split vocabulary: `reference` in plain torch, `chunked` in bounded memory."""

from megatron_xmtf.kernels.head_loss.chunked import VocabularyShard, head_loss

__all__ = ["VocabularyShard", "head_loss"]
