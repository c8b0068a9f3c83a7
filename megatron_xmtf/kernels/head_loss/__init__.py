"""Cross-entropy over a large, split vocabulary: `reference` in plain torch, `chunked` in bounded memory."""

from megatron_xmtf.kernels.head_loss.choose import HeadLoss, choose_head_loss
from megatron_xmtf.kernels.head_loss.chunked import VocabularyShard, head_loss

__all__ = ["HeadLoss", "VocabularyShard", "choose_head_loss", "head_loss"]
