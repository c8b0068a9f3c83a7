"""The layers of one side, encoder or decoder, that a chunk holds: its own loop, for Megatron-Core's knows one stack.

    encoder.layers.4  encoder.layers.5  encoder.final_layernorm  encoder.relative_attention_bias      of a middle stage

Layers are numbered through their whole side, so that the names of parameters are those of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor, nn

from megatron_xmtf.config.schema import RecomputeConfig
from megatron_xmtf.models.encoder_decoder_architecture import EncoderDecoderArchitecture
from megatron_xmtf.models.encoder_decoder_layers import (
    LayerSettings,
    TokenEmbedding,
    build_layer,
    norm_class,
    own_dropout,
)
from megatron_xmtf.models.relative_bias import RelativeBias
from megatron_xmtf.models.stages import ChunkPlace

__all__ = ["LayerRunner", "Stack"]


class LayerRunner:
    """Runs layers, some of them in groups that are computed again in the backward pass.

    5 layers, full, uniform by 2     [0 1] [2 3] [4]     each group keeps its input alone
    5 layers, full, block of 2       [0] [1]  2  3  4    the first two of the stack keep their input alone
    """

    def __init__(self, recompute: RecomputeConfig) -> None:
        self.recompute = recompute

    def groups(self, count: int) -> list[tuple[range, bool]]:
        """Return the groups of `count` layers, and whether each is computed again."""
        size = self.recompute.num_layers
        if self.recompute.granularity != "full":
            return [(range(count), False)]
        if self.recompute.method == "uniform":
            return [(range(begin, min(begin + size, count)), True) for begin in range(0, count, size)]
        return [(range(place, place + 1), place < size) for place in range(count)]

    def run(
        self,
        layers: list[nn.Module],
        hidden: Tensor,
        context: Tensor | None,
        bias: Tensor | None,
        *,
        own: Any,
        across: Any,
        training: bool,
    ) -> Tensor:
        """Run layers on hidden [s, b, h]; own and across: segments of self- and cross-attention.

        What needs a gradient is an argument of the recomputed function, never closed over.
        """

        def run_group(places: range, hidden: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
            for place in places:
                hidden, _ = layers[place](
                    hidden_states=hidden,
                    attention_mask=own,
                    context=context,
                    context_mask=across,
                    attention_bias=bias,
                )
            return hidden

        for places, again in self.groups(len(layers)):
            if again and training:
                hidden = tensor_parallel.checkpoint(_bound(run_group, places), False, hidden, context, bias)
            else:
                hidden = run_group(places, hidden, context, bias)
        return hidden


def _bound(function: Any, places: range) -> Any:
    return lambda hidden, context, bias: function(places, hidden, context, bias)


class NumberedLayers(MegatronModule):
    """Layers under the numbers of their whole side; Megatron-Core's schedules go through them in order.

    A bare ModuleDict would lose in checkpoints how its layers are split over ranks.
    """

    def __init__(self, config: TransformerConfig, layers: dict[int, TransformerLayer]) -> None:
        super().__init__(config=config)
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __iter__(self) -> Iterator[nn.Module]:
        """Go through the layers in order."""
        return iter(self.children())

    def __len__(self) -> int:
        """Count the layers."""
        return len(self._modules)


class Stack(MegatronModule):
    """One side's part of a chunk.

    Args:  side: encoder or decoder. layers: numbers within the side. has_norm: the side ends here.
           place: of the chunk. runner: which layers are computed again.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: EncoderDecoderArchitecture,
        settings: LayerSettings,
        *,
        side: Literal["encoder", "decoder"],
        layers: list[int],
        has_norm: bool,
        place: ChunkPlace,
        runner: LayerRunner,
    ) -> None:
        super().__init__(config=config)
        self.is_decoder, self.prepare, self.runner = side == "decoder", settings.attention.prepare, runner
        learned = architecture.positions == "learned"
        if place.pre_process and (learned or not architecture.tied_embeddings):
            self.embedding = TokenEmbedding(
                config, architecture, words=not architecture.tied_embeddings, positions=learned
            )
        if not learned:
            self.relative_attention_bias = RelativeBias(
                config, architecture, bidirectional=not self.is_decoder, copy=place.copy
            )
        # Megatron-Core adds the layers that it thinks are on earlier stages.
        offset = get_transformer_layer_offset(config, place.vp_stage)
        self.layers = NumberedLayers(
            config,
            {
                number: build_layer(
                    config,
                    architecture,
                    settings,
                    crosses=self.is_decoder,
                    layer_number=number + 1 - offset,
                    vp_stage=place.vp_stage,
                )
                for number in layers
            },
        )
        self.final_layernorm: nn.Module | None = None
        if has_norm:
            self.final_layernorm = norm_class(architecture)(config, config.hidden_size, config.layernorm_epsilon)

    @property
    def table(self) -> RelativeBias | None:
        """The table of relative positions, if there is one; every chunk holds it, used or not."""
        return self.relative_attention_bias if hasattr(self, "relative_attention_bias") else None

    def embed(self, tokens: Tensor, position_ids: Tensor | None, *, shared: TokenEmbedding | None) -> Tensor:
        """Embed int64 [b, s] -> [s, b, h]; shared: the words of both sides, None where this side has its own."""
        hidden = (shared or self.embedding).embed_words(tokens)
        if hasattr(self, "embedding") and hasattr(self.embedding, "position_embeddings"):
            assert position_ids is not None, "learned positions need position ids"
            hidden = hidden + self.embedding.embed_positions(position_ids)
        return self._drop(hidden)

    def forward(
        self, hidden: Tensor, *, queries: Tensor, context: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Run this chunk's layers of the side, and the last norm where it is here.

        Args:    hidden: [s, b, h]. queries: segment ids of the side, int64 [b, s].
                 context, keys: of a decoder: the encoder's hidden states and segment ids.
        """
        if len(self.layers):
            own = self.prepare(queries, queries, causal=self.is_decoder)
            across = self.prepare(queries, keys, causal=False) if self.is_decoder else None
            bias = None if self.table is None else self.table(own.longest)
            # Under sequence parallelism ranks hold other tokens, and all masks differ, as in Megatron-Core's block.
            with own_dropout(forked=not self.config.sequence_parallel):
                hidden = self.runner.run(
                    list(self.layers),
                    hidden,
                    context if self.is_decoder else None,
                    bias,
                    own=own,
                    across=across,
                    training=self.training,
                )
        if self.final_layernorm is not None:
            hidden = self._drop(self.final_layernorm(hidden))
        return hidden

    def _drop(self, hidden: Tensor) -> Tensor:
        rate = self.config.hidden_dropout if self.training else 0.0
        if rate == 0.0:
            return hidden
        with own_dropout(forked=not self.config.sequence_parallel):
            return nn.functional.dropout(hidden, rate)
