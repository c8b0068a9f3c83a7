"""Ids equal transformers'; the fingerprint knows a tokenizer by its content; unusable directories are refused."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import TokenizerError

TEXTS = ["How many months?", "", " leading and  double ", "一年有几个月？", "बारह महीने।", "<not a token> \n\t é"]


def edited(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer and replace keys of its tokenizer_config.json."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


def test_ids_equal_transformers(tokenizer_directory: Path) -> None:
    ours, theirs = Tokenizer.load(tokenizer_directory), AutoTokenizer.from_pretrained(tokenizer_directory)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert (ours.vocab_size, ours.eos_id, ours.pad_id) == (len(theirs), theirs.eos_token_id, theirs.pad_token_id)
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ours.decode([*ids, ours.eos_id]) == text + "</s>"
        assert ours.decode([*ids, ours.eos_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["t5-small", "whisper-large-v3"])
def test_real_tokenizers_equal_transformers(shared_data: Path, tmp_path: Path, name: str) -> None:
    directory = shared_data / "tokenizers" / name
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    sentences = (shared_data / "ntrex" / "newstest2019-ref.hin.txt").read_text(encoding="utf-8").splitlines()[:50]
    assert ours.encode_batch(sentences) == [theirs.encode(text, add_special_tokens=False) for text in sentences]
    assert ours.vocab_size == len(theirs) and ours.eos_id == theirs.eos_token_id
    theirs.save_pretrained(tmp_path)  # another file, the same tokenizer
    assert Tokenizer.load(tmp_path).fingerprint == ours.fingerprint


def test_loading_imports_neither_torch_nor_transformers(tokenizer_directory: Path) -> None:
    program = (
        f"import sys; from megatron_xmtf.data.tokenizer import Tokenizer; Tokenizer.load({str(tokenizer_directory)!r});"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_fingerprint_is_of_the_content(tokenizer_directory: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(tokenizer_directory)
    shutil.copytree(tokenizer_directory, tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").fingerprint == ours.fingerprint

    # The same size, two ids swapped: every text still encodes to as many tokens.
    shutil.copytree(tokenizer_directory, tmp_path / "permuted")
    path = tmp_path / "permuted" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    permuted = Tokenizer.load(tmp_path / "permuted")
    assert permuted.vocab_size == ours.vocab_size and permuted.fingerprint != ours.fingerprint

    # A normaliser alone changes ids, hence the fingerprint; the post-processor is never used.
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "permuted").fingerprint == ours.fingerprint
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "permuted").fingerprint != ours.fingerprint


def test_special_tokens_are_found_in_each_file(tokenizer_directory: Path, tmp_path: Path) -> None:
    as_object = edited(tokenizer_directory, tmp_path / "object", eos_token={"content": "<s>"}, pad_token=None)
    assert (Tokenizer.load(as_object).eos_id, Tokenizer.load(as_object).pad_id) == (1, 1)
    by_map = edited(tokenizer_directory, tmp_path / "map", eos_token=None)
    (by_map / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer.load(by_map).eos_id == 2
    by_config = edited(tokenizer_directory, tmp_path / "config", eos_token=None)
    (by_config / "config.json").write_text('{"eos_token_id": [2]}')
    assert Tokenizer.load(by_config).eos_id == 2


def test_unusable_directories_are_refused(tokenizer_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="hf download"):
        Tokenizer.load("bigscience/bloom-560m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path / "empty")
    with pytest.raises(TokenizerError, match="names no end-of-sequence token.*eos_token"):
        Tokenizer.load(edited(tokenizer_directory, tmp_path / "no_eos", eos_token=None))
    with pytest.raises(TokenizerError, match="'<end>', which is not in the vocabulary"):
        Tokenizer.load(edited(tokenizer_directory, tmp_path / "unknown_eos", eos_token="<end>"))
    broken = edited(tokenizer_directory, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match="not a tokenizer that"):
        Tokenizer.load(broken)
    two_eos = edited(tokenizer_directory, tmp_path / "two_eos", eos_token=None)
    (two_eos / "config.json").write_text('{"eos_token_id": [1, 2]}')
    with pytest.raises(TokenizerError, match="not one id"):
        Tokenizer.load(two_eos)
    not_json = edited(tokenizer_directory, tmp_path / "not_json")
    (not_json / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        Tokenizer.load(not_json)
    far = edited(tokenizer_directory, tmp_path / "far")
    content = json.loads((far / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    word = max(vocabulary, key=vocabulary.get)
    vocabulary[word] = 2**31
    (far / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match=f"gives {word!r} the id {2**31}; ids are below"):
        Tokenizer.load(far)


def test_sentencepiece_directory(tmp_path: Path) -> None:
    """Through transformers, which needs protobuf; where that is missing the message says so."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{word} number {n}" for n in range(300) for word in ("house", "Haus", "nyumba")))
    directory = tmp_path / "spm"
    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "spiece"), vocab_size=50, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    try:
        has_protobuf = find_spec("google.protobuf") is not None
    except ModuleNotFoundError:
        has_protobuf = False
    if not has_protobuf:
        with pytest.raises(TokenizerError, match="pip install protobuf"):
            Tokenizer.load(directory)
        return
    ours = Tokenizer.load(directory)
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))
    assert ours.encode_batch(["house number 7"]) == [model.encode("house number 7")]
    assert ours.eos_id == 1
