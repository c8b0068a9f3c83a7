"""Open a `.pt` file that somebody else's training wrote: tensors and plain data, nothing else, every byte checked.

    bytes     every record of the archive has the CRC-32 that it was written with; torch checks none
    pickle    torch's `weights_only` loader and `STAND_INS`; any other name is refused, there is no second try
    tensors   memory-mapped: what is not read takes no memory

DeepSpeed and Megatron put objects of their own beside the tensors (the run's settings, which part of a parameter is
where). Neither program is imported: a stand-in takes the place of each such class, keeps what the file says of the
object and does nothing.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_xmtf.checkpoint.stored_chunk import DAMAGE
from megatron_xmtf.errors import CorruptCheckpointError
from megatron_xmtf.files import require_file

__all__ = ["STAND_INS", "StandIn", "check_bytes", "fields_of", "is_archive", "open_torch_file", "stand_in_class"]

BLOCK_BYTES = 1 << 20


class StandIn:
    """An object of a class that is not loaded: what it was called with, and the state that the file gives it."""

    arguments: tuple[Any, ...]
    """What it was made of: an enum's member is its class, called with the member's value."""
    state: Any
    """What the file says of it otherwise: the attributes by name, mostly."""

    def __new__(cls, *arguments: Any) -> StandIn:
        """Make one; a pickle does so without `__init__`."""
        self = super().__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


_NAMES = (
    # The run's settings, in `args` of mp_rank_XX_model_states.pt and of Megatron-LM's common.pt.
    "argparse.Namespace",
    "megatron.enums.AttnMaskType",
    "megatron.enums.AttnType",
    "megatron.enums.LayerType",
    "megatron.enums.PositionEmbeddingType",
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "signal.Signals",
    "deepspeed.runtime.data_pipeline.curriculum_scheduler.CurriculumScheduler",
    # ZeRO: where a parameter lies in a rank's flat partition (up to 0.7.1, and since), its stage, its loss scaler.
    "deepspeed.runtime.bf16_optimizer.fragment_address",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    # numpy's random state.
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
)


def stand_in_class(name: str) -> type[StandIn]:
    """Make the class that stands in for `name`."""
    return type(name.rpartition(".")[2], (StandIn,), {"__module__": __name__})


STAND_INS: Mapping[str, type[StandIn]] = {name: stand_in_class(name) for name in _NAMES}
"""Full name in a pickle -> what is put there. What real files name; torch's tensors, sizes and types besides."""


def open_torch_file(path: Path | str, *, check: bool = True, legacy: bool = False) -> Any:
    """Load a file of `torch.save`, its tensors memory-mapped.

    Args:    check: compare the CRC-32 of all bytes first; reads the whole file once. legacy: also open what torch
             before 1.6 wrote: no archive, no checksums, not mapped.
    Raises:  MissingError: no such file. CorruptCheckpointError: cut off, altered, older than torch 1.6 (no archive), or
             it names anything but tensors, plain data and `STAND_INS`; the refused name is given.
    """
    path = require_file(path)
    mapped = not legacy or is_archive(path)
    if check and mapped:
        check_bytes(path)
    try:
        with _only_stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle protocol; what matters comes as an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load it without the restriction.
        named = _refused_name(str(error))
        raise CorruptCheckpointError(
            f"{path} is refused: it names {named}. It is damaged, was made to run code, or holds objects of a program "
            "that is not known here; get it from a source that you trust, or one that holds tensors alone."
        ) from error
    except (*DAMAGE, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptCheckpointError(f"{path} is damaged: {reason[:200]}. Get it again.") from error


def is_archive(path: Path) -> bool:
    """Whether a file is an archive, as torch writes since 1.6."""
    with open(path, "rb") as stream:
        return stream.read(2) == b"PK"


def _refused_name(message: str) -> str:
    """Return the name that torch's loader refused, out of its words."""
    words = message.replace("`", " ").split()
    return words[words.index("GLOBAL") + 1] if "GLOBAL" in words[:-1] else "what no checkpoint needs"


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Let torch's loader find `STAND_INS` and nothing else meanwhile.

    Its list is the process's: Megatron-Core and others put real classes and functions of numpy on it at their import.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def check_bytes(path: Path) -> None:
    """Compare every record of the archive with its CRC-32.

    Raises:  CorruptCheckpointError: names the record, and for a flat dictionary of tensors the tensor that it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CorruptCheckpointError(f"{path}: {record.filename} is compressed, which torch never does.")
                _check_record(path, archive, record)
    except CorruptCheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole file of `torch.save` (1.6 or newer): {error}. "
            "Get it again."
        ) from error


def _check_record(path: Path, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    try:
        with archive.open(record) as stream:
            while stream.read(BLOCK_BYTES):
                pass
    except zipfile.BadZipFile as error:
        raise CorruptCheckpointError(
            f"{path}: {record.filename}{_tensor_of(path, record.filename)} is not as it was written ({error}). "
            "Get the file again."
        ) from error


def _tensor_of(path: Path, record: str) -> str:
    """Word which tensor a record `.../data/7` is: the 8th storage, in the order that `torch.save` met them."""
    _, _, number = record.partition("/data/")
    if not number.isdigit():
        return ""
    try:
        storages: dict[int, str] = {}
        for name, tensor in _named_tensors(open_torch_file(path, check=False)):
            storages.setdefault(tensor.untyped_storage().data_ptr(), name)
    except CorruptCheckpointError:
        return ""
    names = list(storages.values())
    return f" ({names[int(number)]})" if int(number) < len(names) else ""


def _named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Walk through nested dictionaries and lists in their order."""
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _named_tensors(item, f"{prefix}.{key}" if prefix else str(key))


def fields_of(value: Any) -> dict[str, Any]:
    """Return the attributes that a file gives a stand-in; nothing for anything else."""
    state = value.state if isinstance(value, StandIn) else None
    return dict(state) if isinstance(state, dict) else {}
