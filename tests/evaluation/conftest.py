"""A tokenizer and a random BLOOM whose logits spread over several units, in a directory as users have it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "What comes after Monday? Tuesday. What comes before? Sunday.",
    "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "понедельник вторник среда четверг пятница суббота воскресенье",
    "星期一 星期二 星期三 الاثنين الثلاثاء",
]


def write_tiny_bloom(directory: Path, *, num_layers: int = 2, seed: int = 0) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=backend.get_vocab_size() + 3,  # not a multiple of 128: the padded rows matter
        hidden_size=32,
        n_layer=num_layers,
        n_head=4,
        eos_token_id=2,
        pad_token_id=3,
        bos_token_id=1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = BloomForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.6 if "embedding" in name else 0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bloom(tmp_path_factory.mktemp("tiny") / "hf")
