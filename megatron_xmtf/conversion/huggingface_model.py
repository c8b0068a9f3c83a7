"""A Hugging Face model directory as a source of tensors: opened, checked, read a few rows at a time.

    model.safetensors  |  model.safetensors.index.json + its shards
    pytorch_model.bin  |  pytorch_model.bin.index.json + its shards     restricted loader only, memory-mapped

No code of the directory runs: pickles go through torch's `weights_only` loader, a config.json that names code
(`auto_map`) is refused, and file names in an index stay below the directory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from megatron_xmtf.checkpoint.stored_chunk import SeeNumbers
from megatron_xmtf.conversion.safetensors_file import DTYPES, read_header
from megatron_xmtf.conversion.torch_file import is_archive, open_torch_file
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingError
from megatron_xmtf.files import read_json, require_directory, require_file, safe_child
from megatron_xmtf.streamed_io import OnceReader

__all__ = ["SIDE_FILES", "HuggingFaceModel", "HuggingFaceTensor", "check_side_files", "copy_side_files"]

logger = logging.getLogger(__name__)

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What travels with the weights, byte for byte, through `CKPT/hf/` into every export."""


@dataclass(frozen=True)
class HuggingFaceTensor:
    """One tensor of a Hugging Face model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    """File that holds it."""
    offset: int | None = None
    """Byte of the file where its numbers begin; None: a pickle knows."""

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HuggingFaceModel:
    """An opened model directory; a context manager.

    Raises:  MissingError: no such directory, config or weights. CheckpointError: not a plain model that can be
             converted. CorruptCheckpointError: a file of weights is truncated or holds more than tensors.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = require_directory(directory)
        self.config = read_config(self.directory)
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}
        self._open: tuple[Path, IO[bytes], OnceReader] | None = None
        self.listing = self._find_listing()
        """What names its tensors: the index, or the one file of weights."""
        self.tensors = self._list_tensors()

    def __enter__(self) -> HuggingFaceModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._close_file()
        self._pickled.clear()

    def _close_file(self) -> None:
        if self._open is not None:
            _, stream, reader = self._open
            reader.close()
            stream.close()
        self._open = None

    def read(self, name: str, *, rows: tuple[int, int] | None = None, see: SeeNumbers | None = None) -> torch.Tensor:
        """Return a tensor, or its rows [start, end), in the type it is stored in.

        Args:    see: is shown all numbers that are returned.
        Raises:  CorruptCheckpointError: its file cannot be read.
        """
        tensor = self.tensors[name]
        if tensor.offset is None:
            whole = self._pickled[tensor.path][name]
            part = whole if rows is None else whole[rows[0] : rows[1]]
            if see is not None:
                see(part)
            return part
        first, last = rows or (0, tensor.shape[0] if tensor.shape else 1)
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        data = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        see_piece = None if see is None else lambda piece: see(torch.frombuffer(piece, dtype=tensor.dtype))
        try:
            reader = self._reader(tensor.path)
            count = reader.read_into(data.numpy().data, tensor.offset + first * row_bytes, see_piece)
        except OSError as error:
            raise CorruptCheckpointError(f"{tensor.path}: {name} cannot be read: {error}.") from error
        if count < len(data):
            raise CorruptCheckpointError(
                f"{tensor.path}: {name} ends {len(data) - count:,} bytes early; the file was cut off. Get it again."
            )
        return data.view(tensor.dtype).view((last - first, *tensor.shape[1:]) if tensor.shape else ())

    def has_checksums(self, path: Path) -> bool:
        """Whether a file of weights holds checksums: a pickle in an archive does, a safetensors file does not."""
        return path in self._pickled and is_archive(path)

    def _reader(self, path: Path) -> OnceReader:
        """Open a file of weights; the last one stays open."""
        if self._open is None or self._open[0] != path:
            self._close_file()
            stream = open(path, "rb", buffering=0)
            self._open = (path, stream, OnceReader(stream.fileno()))
        return self._open[2]

    def _find_listing(self) -> Path:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            for name in (f"{stem}.index.json", stem):
                if (self.directory / name).is_file():
                    return weights_path(self.directory, name)
        raise MissingError(
            f"{self.directory} holds no weights: none of model.safetensors, model.safetensors.index.json, "
            "pytorch_model.bin, pytorch_model.bin.index.json is there."
        )

    def _list_tensors(self) -> dict[str, HuggingFaceTensor]:
        read_file = self._list_safetensors if "safetensors" in self.listing.name else self._list_pickled
        return self._list_indexed(read_file) if self.listing.suffix == ".json" else read_file(self.listing)

    def _list_indexed(self, read_file: Callable[[Path], dict[str, HuggingFaceTensor]]) -> dict[str, HuggingFaceTensor]:
        index = self.listing
        contents = read_json(index)
        weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no `weight_map` of tensor names to file names.")
        found: dict[str, HuggingFaceTensor] = {}
        for name in sorted(set(weight_map.values())):
            inside = read_file(weights_path(self.directory, name))
            listed = {key for key, file_name in weight_map.items() if file_name == name}
            differing = sorted(listed ^ set(inside))
            if differing:
                raise CheckpointError(
                    f"{index} and {name} disagree about {len(differing)} tensors: {', '.join(differing[:5])}. "
                    "Get both again from one source."
                )
            found.update(inside)
        return found

    def _list_safetensors(self, path: Path) -> dict[str, HuggingFaceTensor]:
        return {
            name: HuggingFaceTensor(tensor.shape, tensor.dtype, path, tensor.offset)
            for name, tensor in read_header(path).items()
        }

    def _list_pickled(self, path: Path) -> dict[str, HuggingFaceTensor]:
        self._pickled[path] = _load_pickled(path)
        found = {}
        for name, tensor in self._pickled[path].items():
            if tensor.dtype not in DTYPES.values():
                kind = dtype_name(tensor.dtype)
                raise CheckpointError(
                    f"{path}: {name} has type {kind}; only {', '.join(DTYPES)} weights are converted."
                )
            found[name] = HuggingFaceTensor(tuple(tensor.shape), tensor.dtype, path)
        return found


def has_weights(directory: Path) -> bool:
    """Whether a directory holds files of weights, whole or not."""
    return any(next(directory.glob(pattern), None) for pattern in ("*.safetensors*", "pytorch_model*.bin*"))


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json, refusing what would need code or cannot be converted.

    Raises:  MissingError: no config.json. CheckpointError: it names code, or is quantised.
    """
    path = require_file(directory / "config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path} names code to run (auto_map: {json.dumps(config['auto_map'])[:120]}). "
            "Such code is never run here; if the model is a plain one of its model_type, remove that key."
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: quantised weights cannot be finetuned; use the model they were made from.")
    return config


def weights_path(directory: Path, name: str) -> Path:
    """Resolve a file name out of an index; also a link of the Hugging Face cache into its own `blobs`.

    Raises:  ConfigError: it leads elsewhere. MissingError: no such file.
    """
    link = directory / name
    blobs = directory.resolve().parent.parent / "blobs"
    if Path(name).name == name and os.path.islink(link) and link.resolve().parent == blobs:
        return require_file(link)
    return require_file(safe_child(directory, name))


def check_side_files(directory: Path) -> None:
    """Check what would be copied: none leads outside, and JSON is JSON.

    Raises:  ConfigError: names the file.
    """
    for name in SIDE_FILES:
        if (directory / name).is_file():
            path = weights_path(directory, name)
            if name.endswith(".json"):
                read_json(path)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy config.json, tokenizer files and the like; return the names."""
    target.mkdir(parents=True, exist_ok=True)
    names = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(weights_path(source, name), target / name)
    return names


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the type of weights that a config.json states, under its new or its old name."""
    value = config.get("dtype", config.get("torch_dtype"))
    return value if isinstance(value, str) else None


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Load a .bin through torch's restricted loader, memory-mapped; `check_bytes` compares its checksums."""
    value = open_torch_file(path, check=False, legacy=True)
    if not isinstance(value, dict) or not all(isinstance(item, torch.Tensor) for item in value.values()):
        raise CheckpointError(f"{path} is not a flat dictionary of tensors.")
    return value


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch type of `float32`, `fp32`, `bf16` and the like; None for None.

    Raises:  ConfigError: not a type of weights.
    """
    known = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if name is not None and name not in known:
        raise ConfigError(f"dtype {name!r} is not known; use one of {', '.join(known)}.")
    return None if name is None else known[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
