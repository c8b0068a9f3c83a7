"""The model families that the quickstart can take along the whole path, and what each of them decides.

                      bloom                                 mt5
model                 4 layers, rows of 256 tokens          2 + 2 layers, rows of 128 tokens read and 128 written
tokenizer             <pad>, </s>                           sentinels as well; </s> ends what is read
pretraining           every token of a text is a target     pieces of texts: beginnings are read, the rest is written
optimizer             AdamW                                 Adafactor
opened by             AutoModelForCausalLM                  AutoModelForSeq2SeqLM
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.errors import ConfigError, nearest_names
from megatron_xmtf.quickstart.plan import Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BLOOM", "FAMILIES", "MT5", "Family", "find_family"]


@dataclass(frozen=True)
class Family:
    """What differs between model families; all else of the quickstart is the same for every one."""

    name: str
    """As `--family` spells it."""
    title: str
    """As a page spells it, with its article."""
    sizes: Sizes
    """The five-minute story."""
    stage_budgets: Mapping[str, int]
    """Stage -> seconds that it may take on 2 cores, in order. A budget is stated, not enforced."""
    make_model: Callable[[Sizes, PreTrainedTokenizerBase], PreTrainedModel]
    """Draw a random model; runs torch."""
    open_model: Callable[[Path], PreTrainedModel]
    """Open an exported directory in `transformers` as any user does."""
    row_lengths: Callable[[Sizes], dict[str, int]]
    """Keys of `batch` that say how long rows are."""
    optimizer: Mapping[str, Any]
    """Keys of `optimizer` in both runs, besides the learning rate."""
    words_on_before: str
    """What the pretraining has to do with the one task that no text tells of, as the page says it."""
    num_sentinels: int = 0
    """Sentinels of the vocabulary, `<extra_id_0>` ..., as T5's has them: span corruption needs some."""
    reads_eos: bool = False
    """Whether `</s>` ends what the model reads; an encoder-decoder's tokenizer puts it there itself."""
    objectives: tuple[Mapping[str, Any], ...] = ()
    """Entries of the pretraining's mixture: weight and objective. None: texts whole, every token a target."""


def _random_bloom(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        n_layer=sizes.num_layers,
        n_head=sizes.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return BloomForCausalLM(config)


def _random_mt5(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    import torch
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=sizes.vocab_size,
        d_model=sizes.hidden_size,
        d_kv=sizes.hidden_size // sizes.num_attention_heads,
        d_ff=2 * sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_decoder_layers=sizes.num_layers,
        num_heads=sizes.num_attention_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = MT5ForConditionalGeneration(config)
    # mT5's head is its own, and transformers 5 ties that of a new model to the embedding, whatever its configuration
    # says. As wide as the embedding (1.0), it would begin with logits of sqrt(d_model); T5X draws it by its fan-in.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * sizes.hidden_size**-0.5)
    return model


def _open_decoder(directory: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)


def _open_encoder_decoder(directory: Path) -> PreTrainedModel:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(directory, local_files_only=True)


BLOOM = Family(
    name="bloom",
    title="a BLOOM",
    sizes=Sizes(),
    stage_budgets={
        "load": 10,
        "facts": 5,
        "render": 10,
        "model": 5,
        "preprocess": 10,
        "import": 5,
        "pack": 5,
        "pretrain": 140,
        "hand over": 5,
        "evaluate before": 15,
        "finetune": 50,
        "evaluate after": 15,
        "export": 5,
        "verify": 10,
        "report": 5,
    },
    make_model=_random_bloom,
    open_model=_open_decoder,
    row_lengths=lambda sizes: {"sequence_length": sizes.sequence_length},
    optimizer={"weight_decay": 0.01},
    words_on_before="No text of the pretraining says what comes before an item, so the finetuning can teach “before” "
    "for its own English items, and finds nothing in the other languages that it could carry over: a model that "
    "continues lists does not turn them round by itself.",
)

MT5 = Family(
    name="mt5",
    title="an mT5",
    sizes=Sizes(
        num_layers=2,
        encoder_length=128,
        decoder_length=128,
        pretrain_steps=900,
        pretrain_lr=3e-2,
        finetune_lr=2e-3,
    ),
    stage_budgets={**BLOOM.stage_budgets, "pretrain": 220, "finetune": 70, "evaluate before": 20, "evaluate after": 20},
    make_model=_random_mt5,
    open_model=_open_encoder_decoder,
    row_lengths=lambda sizes: {"encoder_length": sizes.encoder_length, "decoder_length": sizes.decoder_length},
    # As T5 and mT0. Scores that are not scaled by sqrt(head_dim) make AdamW at BLOOM's rate unsteady: rates relative to
    # each matrix do not.
    optimizer={"name": "adafactor"},
    words_on_before="No text of the pretraining says what comes before an item: the model read beginnings of short "
    "pieces and wrote how they go on. So the finetuning can teach “before” for its own English items, and finds "
    "nothing in the other languages that it could carry over.",
    num_sentinels=32,
    reads_eos=True,
    # Pieces of 16 tokens have many places where what is written follows from what was read alone, as in a question. Of
    # whole texts most tokens follow from those written before, and the encoder learns little.
    objectives=({"objective": {"name": "prefix_lm", "chunk_length": 16}},),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (BLOOM, MT5)}


def find_family(name: str) -> Family:
    """Return a family by name.

    Raises:  ConfigError: there is none of this name.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"--family {name}: the quickstart knows {', '.join(FAMILIES)} ({nearest_names(name, FAMILIES)})."
        )
    return FAMILIES[name]
