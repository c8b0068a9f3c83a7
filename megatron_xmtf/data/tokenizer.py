"""A tokenizer read from a Hugging Face directory, identified by its content.

`tokenizer.json` is read by the `tokenizers` library, so that preprocessing needs neither torch nor transformers.
A directory that holds only a sentencepiece model (or `vocab.json` + `merges.txt`) is converted by transformers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xmtf.data.segment_rule import NoSegments, SegmentRule, find_segment_rule
from megatron_xmtf.errors import TokenizerError, XmtfError
from megatron_xmtf.files import read_json, sha256_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["Tokenizer"]

SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name special tokens by their text, the first one that names it wins."""
CONVERTIBLE_PATTERNS = ("*.model", "merges.txt", "vocab.txt")
"""What transformers can turn into a fast tokenizer when there is no tokenizer.json."""
NOT_FINGERPRINTED = ("version", "truncation", "padding", "post_processor", "decoder")
"""Parts of tokenizer.json that change no id here: text is encoded whole and without added special tokens."""
MOST_IDS = 1 << 24
"""60 times the largest vocabularies in use; `tokenizers` walks through each id left out, for half a minute at 2^31."""
REMEDY_CONVERT = "(where transformers can read it: AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW_DIR))"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; load it with `Tokenizer.load(directory)`."""

    directory: Path
    """Where it was read from."""
    vocab_size: int
    """One more than the largest id, added tokens included; every id is below it."""
    eos_id: int
    """Id that ends every target and every document."""
    pad_id: int
    """Id that fills rows; the EOS id where the tokenizer names no padding token (padding is told by segment_ids)."""
    fingerprint: str
    """SHA-256 over vocabulary, merges or scores, added tokens, normaliser and pre-tokeniser: equal means equal ids."""
    segment_rule: SegmentRule | NoSegments
    """Where a text may be cut without changing an id."""
    backend: Backend

    @staticmethod
    def load(directory: Path | str) -> Tokenizer:
        """Read a tokenizer from a directory in the Hugging Face format; nothing is downloaded, no remote code is run.

        Raises:  TokenizerError: no such directory, no tokenizer in it, unreadable, or no end-of-sequence token.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise TokenizerError(
                f"tokenizer {directory} is not a directory; give a local directory that holds tokenizer.json "
                "(a model on the hub is fetched first: `hf download NAME --local-dir DIR`)."
            )
        defaults: dict[str, int] = {}
        try:
            if (directory / "tokenizer.json").is_file():
                backend = _read_tokenizer_json(directory / "tokenizer.json")
            else:
                backend, defaults = _convert_with_transformers(directory)
            configs = [_read_optional(directory / name) for name in (*SPECIAL_TOKEN_FILES, "config.json")]
        except TokenizerError:
            raise
        except XmtfError as error:
            raise TokenizerError(f"tokenizer {directory} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError(f"tokenizer {directory} has an empty vocabulary; check tokenizer.json.")
        token, largest = max(vocabulary.items(), key=lambda item: item[1])
        if largest >= MOST_IDS:
            raise TokenizerError(
                f"tokenizer {directory} gives {token!r} the id {largest}; ids are below {MOST_IDS}, for a model has a "
                "row of its embedding for each id up to the largest. The file is damaged; fetch it again."
            )
        eos_id = _special_id("eos", directory, vocabulary, configs, defaults)
        if eos_id is None:
            raise TokenizerError(
                f"tokenizer {directory} names no end-of-sequence token, and every target must end with one; add "
                '"eos_token": "</s>" (the token that ends a text in this model) to its tokenizer_config.json.'
            )
        pad_id = _special_id("pad", directory, vocabulary, configs, defaults)
        content = json.loads(backend.to_str())
        return Tokenizer(
            directory=directory,
            vocab_size=largest + 1,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            fingerprint=_fingerprint(content),
            segment_rule=find_segment_rule(content),
            backend=backend,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; no special tokens are added."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; special tokens are shown unless they are to be skipped."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))


def _read_tokenizer_json(path: Path) -> Backend:
    from tokenizers import Tokenizer as BackendTokenizer

    try:
        return BackendTokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise TokenizerError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error


def _convert_with_transformers(directory: Path) -> tuple[Backend, dict[str, int]]:
    """Let transformers build a fast tokenizer; also return the special ids that its class knows by default."""
    found = [path.name for pattern in CONVERTIBLE_PATTERNS for path in sorted(directory.glob(pattern))]
    if not found:
        raise TokenizerError(
            f"{directory} holds no tokenizer: neither tokenizer.json nor a sentencepiece *.model, merges.txt or "
            "vocab.txt; give the directory of a Hugging Face model or tokenizer."
        )
    if any(name.endswith(".model") for name in found) and not _is_installed("google.protobuf"):
        raise TokenizerError(
            f"{directory} holds only the sentencepiece model {found[0]}, and reading it needs the package protobuf; "
            f"`pip install protobuf`, or give a directory with a tokenizer.json {REMEDY_CONVERT}."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # converters raise many kinds; all of them mean that this directory cannot be used
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise TokenizerError(
            f"transformers cannot convert {', '.join(found)} of {directory}: {reason[0]} "
            f"Give a directory with a tokenizer.json {REMEDY_CONVERT}."
        ) from error
    known = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return backend, {name: value for name, value in known.items() if isinstance(value, int)}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _read_optional(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def _special_id(
    role: str,
    directory: Path,
    vocabulary: Mapping[str, int],
    configs: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, int],
) -> int | None:
    """Find the id of the `eos` or `pad` token: by text in the tokenizer's files, by id in config.json."""
    for name, config in zip(SPECIAL_TOKEN_FILES, configs, strict=False):
        token = config.get(f"{role}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if not isinstance(token, str) or token not in vocabulary:
            raise TokenizerError(
                f"{directory / name} names {role}_token {token!r}, which is not in the vocabulary of "
                f"{len(vocabulary)} tokens; correct the file."
            )
        return vocabulary[token]
    value = configs[-1].get(f"{role}_token_id", defaults.get(role))
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= max(vocabulary.values()):
        raise TokenizerError(
            f"{directory / 'config.json'} gives {role}_token_id {value!r}, which is not one id of the vocabulary of "
            f'{len(vocabulary)} tokens; name "{role}_token" in tokenizer_config.json instead.'
        )
    return value


def _fingerprint(content: Mapping[str, Any]) -> str:
    """Hash what decides the ids of a text, given in the form that `tokenizers` itself writes."""
    content = {key: value for key, value in content.items() if key not in NOT_FINGERPRINTED}
    merges = content["model"].get("merges")
    if merges is not None:  # older files spell a merge "a b", newer ones ["a", "b"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        content["model"] = {**content["model"], "merges": merges}
    content["added_tokens"] = sorted(content.get("added_tokens", []), key=lambda token: token["id"])
    return sha256_json(content)
