"""mT5, T5 and AlexaTM on Megatron-Core's layers; one tensor [enc; dec] travels through its unmodified pipeline.

    stage           0                    1 (holds the border)             2
    in              tokens of both       [e; d]                           [e; d]
    encoder layers  e -> e               e -> e, last norm                carries e, which cross-attention reads
    decoder layers  carries d            d -> d, with e                   d -> d, with e; last norm, head, losses
    out             [e; d]               [e; d]                           losses

e is [encoder_length, b, h] and d [decoder_length, b, h]. Under sequence parallelism each part is split over the
tensor-parallel ranks by itself, never the whole, so that a rank's [e; d] is again e first, then d. What travels is
encoder_length + decoder_length long for every stage, as the schedules want it. Every stage reads its own batch:
segments for attention, lengths for the cut.

Source:  Raffel et al. 2020 (T5); Xue et al. 2021 (mT5); Soltan et al. 2022 (AlexaTM 20B).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmtf.config.schema import RecomputeConfig
from megatron_xmtf.kernels.head_loss import HeadLoss
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.encoder_decoder_layers import LayerSettings, TokenEmbedding
from megatron_xmtf.models.encoder_decoder_stack import LayerRunner, Stack
from megatron_xmtf.models.head import VocabularyHead
from megatron_xmtf.models.relative_bias import give_unused_table_zeros
from megatron_xmtf.models.stages import ChunkPlace

__all__ = ["EncoderDecoderModel"]


class EncoderDecoderModel(LanguageModule):
    """One pipeline stage (or virtual chunk) of an encoder-decoder.

    Args:  config: Megatron-Core's. architecture: the whole model. settings: of layers. head_loss: the chosen kernel.
           place: which part this is. recompute: which layers are computed again in the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: EncoderDecoderArchitecture,
        *,
        settings: LayerSettings,
        head_loss: HeadLoss,
        place: ChunkPlace,
        recompute: RecomputeConfig,
    ) -> None:
        super().__init__(config=config)
        self.architecture, self.place = architecture, place
        self.pre_process, self.post_process, self.vp_stage = place.pre_process, place.post_process, place.vp_stage
        self.share_embeddings_and_output_weights = architecture.tied_head
        self.model_type = ModelType.encoder_or_decoder
        self.input_tensor: Tensor | None = None
        if place.pre_process and architecture.tied_embeddings:
            self.embedding = TokenEmbedding(config, architecture, words=True, positions=False)
        runner = LayerRunner(recompute)
        border, numbers = architecture.num_encoder_layers, place.layers
        self.encoder = Stack(
            config,
            architecture,
            settings,
            side="encoder",
            layers=[number for number in numbers if number < border],
            has_norm=border - 1 in numbers,
            place=place,
            runner=runner,
        )
        self.decoder = Stack(
            config,
            architecture,
            settings,
            side="decoder",
            layers=[number - border for number in numbers if number >= border],
            has_norm=place.post_process,
            place=place,
            runner=runner,
        )
        if place.post_process:
            has_weight = not (architecture.tied_head and place.pre_process)
            self.output_layer = VocabularyHead(config, architecture, has_weight=has_weight, head_loss=head_loss)
        self._mark_tied_head()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's [enc; dec]; called by Megatron-Core's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        encoder_tokens: Tensor,
        encoder_segment_ids: Tensor,
        decoder_tokens: Tensor,
        decoder_segment_ids: Tensor,
        labels: Tensor | None = None,
        loss_positions: Tensor | None = None,
        encoder_position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk; e and d are encoder and decoder tokens of a row, segments as in `EncoderDecoderBatch`.

        Args:    encoder_tokens, encoder_segment_ids, encoder_position_ids: int64 [b, e]; positions are read where the
                 architecture has learned ones. decoder_*, labels: int64 [b, d]; labels None: logits are wanted.
                 loss_positions: int64 [n], of [d, b] flattened, where a loss is computed; None: everywhere.
        Returns: [enc; dec] [e + d, b, h] on inner stages ([(e + d) / tp, b, h] under sequence parallelism); on the last
                 stage fp32 losses [b, d] with labels (0 where none is computed), logits [b, d, vocab / tp] without.
        """
        if self.pre_process:
            e, d = self._embed(encoder_tokens, encoder_position_ids, decoder_tokens, decoder_position_ids)
        else:
            e, d = self._received(encoder_tokens.size(1), decoder_tokens.size(1))
        for stack in (self.encoder, self.decoder):
            if stack.table is not None and not len(stack.layers):
                # By way of d, which the loss depends on in every chunk; e is not read behind the last decoder layer.
                d = give_unused_table_zeros(d, stack.table)
        e = self.encoder(e, queries=encoder_segment_ids)
        d = self.decoder(d, queries=decoder_segment_ids, context=e, keys=encoder_segment_ids)
        if not self.post_process:
            # Last, and no view: Megatron-Core frees what was sent, and e and d are needed for the backward pass.
            return torch.cat([e, d], dim=0)
        return self._answer(d, labels, loss_positions)

    def decode(
        self,
        decoder_tokens: Tensor,
        decoder_segment_ids: Tensor,
        decoder_position_ids: Tensor,
        *,
        encoded: Tensor | None,
        encoder_segment_ids: Tensor,
        labels: Tensor | None = None,
        loss_positions: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk's decoder layers alone, on inputs that were encoded before; without gradients.

        Args:    encoded: [e, b, h] of the whole encoder ([e / tp, b, h] under sequence parallelism); None where the
                 chunk has no decoder layer. The others as in `forward`.
        Returns: as `forward`, but decoder hidden states [d, b, h] alone on inner stages.
        """
        if self.pre_process:
            shared = self.embedding if self.architecture.tied_embeddings else None
            d = self.decoder.embed(decoder_tokens, decoder_position_ids, shared=shared)
        else:
            assert self.input_tensor is not None, "a later stage is given what the one before has sent"
            d = self.input_tensor
        d = self.decoder(d, queries=decoder_segment_ids, context=encoded, keys=encoder_segment_ids)
        return self._answer(d, labels, loss_positions) if self.post_process else d

    def _answer(self, d: Tensor, labels: Tensor | None, loss_positions: Tensor | None) -> Tensor:
        """Return losses or logits out of the decoder's last hidden states."""
        weight = self.shared_embedding_or_output_weight() if self.architecture.tied_head else self.output_layer.weight
        if self.architecture.scaled_head:
            d = d * self.architecture.head_scale
        output: Tensor = self.output_layer(d, weight, labels, loss_positions)
        return output

    def _embed(
        self,
        encoder_tokens: Tensor,
        encoder_position_ids: Tensor | None,
        decoder_tokens: Tensor,
        decoder_position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        shared = self.embedding if self.architecture.tied_embeddings else None
        e = self.encoder.embed(encoder_tokens, encoder_position_ids, shared=shared)
        d = self.decoder.embed(decoder_tokens, decoder_position_ids, shared=shared)
        return e, d

    def _received(self, encoder_length: int, decoder_length: int) -> tuple[Tensor, Tensor]:
        assert self.input_tensor is not None, "a later stage is given what the one before has sent"
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        lengths = [encoder_length // ranks, decoder_length // ranks]
        # Only the sum travels: a stage whose batch is of other lengths would cut at the wrong place.
        assert self.input_tensor.size(0) == sum(lengths), f"received {self.input_tensor.size(0)}, not {lengths}"
        e, d = torch.split(self.input_tensor, lengths, dim=0)
        return e, d

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return this chunk's copy of the table that embedding and head share, None where it has none.

        That is the one of both sides, or the decoder's where each has its own.
        """
        if self.pre_process:
            holder = self if self.architecture.tied_embeddings else self.decoder
            return holder.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None

    def _mark_tied_head(self) -> None:
        """Mark the two copies of a tied table: one bucket each for the distributed optimizer, the norm counts one."""
        if not self.architecture.tied_head or self.pre_process == self.post_process:
            return
        weight: Any = self.shared_embedding_or_output_weight()
        weight.shared_embedding = True
        weight.shared = self.post_process

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe this chunk to checkpoints; names have no stage in them, so that any split reads them."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        head = state.get(f"{prefix}output_layer.weight")
        if head is not None and self.architecture.tied_head and not self.architecture.tied_embeddings:
            head.key = f"{prefix}decoder.embedding.word_embeddings.weight"
        return state
