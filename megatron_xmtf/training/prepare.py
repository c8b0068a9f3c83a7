"""Everything that is checked or built before a GPU is busy: model, data, packing index, resume point.

`prepare_run` runs once, in one process, before the ranks start (or on rank 0 alone, before any collective), so that
no rank waits in a collective while an index is built, and a mistake costs seconds, not a queue's hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_xmtf.checkpoint.directory import find_checkpoint, find_newest_valid, list_checkpoints, step_directory
from megatron_xmtf.checkpoint.manifest import MANIFEST_NAME, open_manifest, verify_hashes
from megatron_xmtf.config.load import write_config
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.conversion.embedding_copies import directory_architecture
from megatron_xmtf.conversion.huggingface import import_huggingface, match_model
from megatron_xmtf.conversion.huggingface_model import HuggingFaceModel, has_weights
from megatron_xmtf.conversion.initialize import initialize_checkpoint
from megatron_xmtf.data.encoder_decoder_rows import EncoderDecoderRows
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.loader import AnyRows, require_even_deal
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import (
    build_packing_index,
    index_directory,
    index_path,
    open_packing_index,
    pack_dataset,
)
from megatron_xmtf.data.packing_index import PackingIndex
from megatron_xmtf.data.rows import PackedRows
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingError
from megatron_xmtf.evaluation.guarding import drop_flagged
from megatron_xmtf.files import require_directory, sha256_json
from megatron_xmtf.models.architecture import Architecture, EncoderDecoderArchitecture, architecture_from_mapping
from megatron_xmtf.parallel.topology import check_world_size
from megatron_xmtf.training.preset_start import (
    check_no_bare_preset,
    check_positions,
    preset_architecture,
    preset_checkpoint,
)
from megatron_xmtf.training.resume import check_same_run, warn_of_changed_versions
from megatron_xmtf.training.stopping import STOP_FILE
from megatron_xmtf.training.trackers import check_trackers

__all__ = ["PreparedRun", "StartPoint", "open_training_rows", "open_validation_rows", "prepare_run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts: fresh weights of `checkpoint`, or all of its state when `resumed`."""

    checkpoint: Path
    """Exists, unless a Hugging Face model is still to be imported there."""
    resumed: bool
    step: int
    """Steps already done."""
    verified: bool = False
    """Whether every file has been compared with its hash already."""


@dataclass(frozen=True)
class PreparedRun:
    """What every rank is given; small and picklable."""

    config: RunConfig
    architecture: Architecture
    start: StartPoint
    hf_files: Path
    """Directory with config.json and tokenizer files, carried into the first checkpoint, from there into the next."""
    packing_key: str
    """Of the packing index, which has been read and verified: the ranks need not do that again."""
    started: float = field(default_factory=time.time, compare=False)
    """When the run's command began, in Unix seconds; its time limit counts from here."""


def prepare_run(
    config: RunConfig,
    *,
    world_size: int,
    allowed_changes: Sequence[str] = (),
    packing_key: str | None = None,
    import_model: bool = True,
    leaves_files: bool = True,
) -> PreparedRun:
    """Check a run, import its model if that is a Hugging Face directory, and build its packing index.

    Args:    world_size: ranks that will train. allowed_changes: keys that may differ from the resumed checkpoint's.
             packing_key: of the index that another rank has built or verified already; None: do that here.
             import_model: False leaves a Hugging Face model where it is, and needs no weights there; those that are
             there are matched by name and shape. Such a run is checked, it cannot be trained.
             leaves_files: False writes no `OUT/config.yaml`, which may be a running run's.
    Raises:  ConfigError: sizes that do not fit. MissingError, DatasetError, TokenizerError, CheckpointError: inputs
             that are absent or do not belong together. ConfigMismatchError: a resumed run that was changed.
    """
    started = time.time()
    if import_model and (Path(config.output) / STOP_FILE).exists():
        raise ConfigError(
            f"{Path(config.output) / STOP_FILE} exists, which asks this run not to train; remove it, and start the "
            "same command again: it goes on where it stopped."
        )
    data_parallel_size = check_world_size(config.parallel, world_size)
    _check_global_batch(config, data_parallel_size)
    check_trackers(config.logging)
    start = _start_point(config, allowed_changes, is_first=packing_key is None and import_model)
    # A model still to be imported is checked where it is, so that a mistake leaves no import behind.
    is_checkpoint = (start.checkpoint / MANIFEST_NAME).is_file()
    if is_checkpoint:
        _verify_side_files(start.checkpoint)
        architecture = architecture_from_mapping(open_manifest(start.checkpoint).architecture)
    else:
        architecture = directory_architecture(config.model) if config.preset is None else preset_architecture(config)
    architecture.check_split(config.parallel)
    _check_row_lengths(config, architecture)
    tokenizer = Tokenizer.load(start.checkpoint / "hf" if is_checkpoint else config.tokenizer_source)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {tokenizer.directory} has {tokenizer.vocab_size} words, the model's embedding "
            f"{architecture.vocab_size} rows: they do not belong together."
        )
    datasets = open_datasets(config.data.training_datasets, batch=config.batch, tokenizer=tokenizer)
    open_datasets(config.data.validation_datasets, batch=config.batch, tokenizer=tokenizer)
    if not is_checkpoint and import_model:
        _make_checkpoint(config, architecture, start.checkpoint)
    elif not is_checkpoint and has_weights(Path(config.model)):
        with HuggingFaceModel(config.model) as model:
            match_model(model)
    if packing_key is None:
        packing_key = _index(config, datasets).key
    if leaves_files:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        write_config(config, output / "config.yaml")
    return PreparedRun(
        config=config,
        architecture=architecture,
        start=start,
        hf_files=start.checkpoint / "hf" if is_checkpoint or import_model else Path(config.tokenizer_source),
        packing_key=packing_key,
        started=started,
    )


def _make_checkpoint(config: RunConfig, architecture: Architecture, output: Path) -> None:
    """Write the checkpoint that a run starts from: a Hugging Face model's weights, or a preset's random ones."""
    if config.preset is None:
        logger.info("importing %s", config.model)
        import_huggingface(config.model, output)
        return
    assert isinstance(architecture, EncoderDecoderArchitecture), "every preset is one"
    logger.info("drawing the weights of preset %s at random, seed %d", config.preset, config.seed)
    initialize_checkpoint(architecture, output, tokenizer=config.tokenizer_source, seed=config.seed)


def _verify_side_files(checkpoint: Path) -> None:
    """Compare config and tokenizer files with their hashes before they are read; the ranks verify the shards.

    Raises:  CorruptCheckpointError: names the altered files.
    """
    manifest = open_manifest(checkpoint)
    verify_hashes(checkpoint, manifest, names=[name for name in manifest.files if name.startswith("hf/")])


def _check_row_lengths(config: RunConfig, architecture: Architecture) -> None:
    """Check that rows have one line for a decoder and two sides for an encoder-decoder."""
    if isinstance(architecture, EncoderDecoderArchitecture):
        check_positions(config, architecture)
    two_sided = config.batch.encoder_length is not None
    if two_sided == isinstance(architecture, EncoderDecoderArchitecture):
        return
    if two_sided:
        raise ConfigError(
            f"batch.encoder_length={config.batch.encoder_length} is of an encoder-decoder, and {config.model} has no "
            "encoder; give batch.sequence_length instead of batch.encoder_length and batch.decoder_length."
        )
    raise ConfigError(
        f"{config.model} is an encoder-decoder, whose rows have two sides; give batch.encoder_length and "
        "batch.decoder_length (1024 and 256, say) instead of batch.sequence_length."
    )


def _rows(
    prepared: PreparedRun, datasets: Sequence[ExampleDataset], index: PackingIndex, *, tokenizer: Tokenizer
) -> AnyRows:
    """Open rows of one line or of two sides, as the model reads them."""
    architecture = prepared.architecture
    if isinstance(architecture, EncoderDecoderArchitecture):
        return EncoderDecoderRows(
            datasets,
            index,
            pad_id=architecture.pad_token_id,
            eos_id=tokenizer.eos_id,
            decoder_start_id=architecture.decoder_start_token_id,
        )
    return PackedRows(datasets, index, pad_id=tokenizer.pad_id)


def open_training_rows(prepared: PreparedRun) -> AnyRows:
    """Open the training rows; `prepare_run` has built and verified their index, here it is mapped alone."""
    tokenizer, config = Tokenizer.load(prepared.hf_files), prepared.config
    datasets = open_datasets(config.data.training_datasets, batch=config.batch, tokenizer=tokenizer)
    path = index_path(index_directory(prepared.config), prepared.packing_key)
    index = PackingIndex.load(path, key=prepared.packing_key, verify=False)
    return _rows(prepared, datasets, index, tokenizer=tokenizer)


def open_validation_rows(prepared: PreparedRun) -> dict[str, tuple[ExampleDataset, AnyRows]]:
    """Open the first `evaluation.rows` rows of each validation dataset, by name."""
    config = prepared.config
    tokenizer = Tokenizer.load(prepared.hf_files)
    opened = {}
    entries = config.data.validation_datasets
    datasets = open_datasets(entries, batch=config.batch, tokenizer=tokenizer)
    for entry, dataset in zip(entries, datasets, strict=True):
        index = pack_dataset(
            dataset,
            entry=entry,
            split_seed=config.data.split_seed,
            sequence_length=config.batch.row_lengths,
            long_examples=config.data.long_examples,
            rows=config.evaluation.rows,
        )
        opened[dataset.name] = (dataset, _rows(prepared, [dataset], index, tokenizer=tokenizer))
    return opened


def _check_global_batch(config: RunConfig, data_parallel_size: int) -> None:
    batch, stages = config.batch, config.parallel.pipeline_model_parallel_size
    require_even_deal(batch.step_rows, batch.micro_batch_size, data_parallel_size)
    if config.parallel.virtual_pipeline_model_parallel_size is None:
        return
    share = batch.micro_batch_size * data_parallel_size
    for size in batch.step_rows.sizes:
        if size // share % stages:
            ramp = "" if batch.rampup_batch_size is None else ", and a rampup_batch_size whose start and increment are"
            raise ConfigError(
                f"{size // share} micro-batches a step are not a multiple of pipeline_model_parallel_size={stages}, "
                f"which a virtual pipeline needs; use a global_batch_size that is a multiple of {share * stages}{ramp}."
            )


def _start_point(config: RunConfig, allowed_changes: Sequence[str], *, is_first: bool) -> StartPoint:
    """Find the checkpoint to resume, or the model to start from.

    Args:    is_first: False: another rank has set damaged checkpoints aside already.
    """
    checkpoints = Path(config.output) / "checkpoints"
    existing = list_checkpoints(checkpoints) if checkpoints.is_dir() else []
    resume = config.checkpoint.resume
    if resume == "none" and existing:
        raise ConfigError(
            f"{checkpoints} holds {len(existing)} checkpoints and checkpoint.resume=none would start over; choose "
            "another output, remove them, or resume with checkpoint.resume=latest."
        )
    if isinstance(resume, int):
        chosen = step_directory(checkpoints, resume)
        if not (chosen / MANIFEST_NAME).is_file():
            steps = ", ".join(str(step) for step, _ in existing) or "none"
            raise MissingError(
                f"there is no finished checkpoint of step {resume} in {checkpoints}; there are: {steps}."
            )
        later = [step for step, _ in existing if step > resume]
        if later:
            raise ConfigError(
                f"checkpoint.resume={resume} would train again what {checkpoints} already holds (steps "
                f"{', '.join(map(str, later))}), and a checkpoint is never overwritten; move those away, or copy "
                f"{chosen.name} into the checkpoints of another output."
            )
        return _resumed(config, chosen, allowed_changes)
    if resume == "latest_valid" and is_first and checkpoints.is_dir():
        newest = find_newest_valid(checkpoints)
        if newest is not None:
            return replace(_resumed(config, newest, allowed_changes), verified=True)
    elif resume == "latest_valid" and existing:
        return replace(_resumed(config, find_checkpoint(checkpoints), allowed_changes), verified=True)
    if checkpoints.is_dir():
        _refuse_damaged(checkpoints, existing)
    if resume == "latest" and existing:
        return _resumed(config, find_checkpoint(checkpoints), allowed_changes)
    return StartPoint(checkpoint=_initial_checkpoint(config), resumed=False, step=0)


def _resumed(config: RunConfig, checkpoint: Path, allowed_changes: Sequence[str]) -> StartPoint:
    manifest = open_manifest(checkpoint)
    if "optimizer" not in manifest.contents or manifest.config is None:
        raise CheckpointError(
            f"{checkpoint} holds {', '.join(manifest.contents)} but no optimizer state: it cannot be resumed. "
            "Start a new run from it with model=CHECKPOINT and another output."
        )
    check_same_run(config, manifest.config, allowed_changes=allowed_changes)
    warn_of_changed_versions(manifest.versions)
    return StartPoint(checkpoint=checkpoint, resumed=True, step=manifest.step)


def _initial_checkpoint(config: RunConfig) -> Path:
    """Return the checkpoint of `model`, or the place in OUT/imported where a Hugging Face directory belongs.

    The place is named after the model's files, so that another `model` never finds the weights of an earlier one.
    """
    if config.preset is not None:
        return preset_checkpoint(config)
    check_no_bare_preset(config)
    model = require_directory(config.model)
    if (model / MANIFEST_NAME).is_file() or not (model / "config.json").is_file():
        return find_checkpoint(model)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.iterdir() if path.is_file()]
    return Path(config.output) / "imported" / sha256_json([str(model.resolve()), *sorted(files)])[:16]


def _refuse_damaged(checkpoints: Path, existing: Sequence[tuple[int, Path]]) -> None:
    """Refuse to go back behind a checkpoint that has lost its manifest (a copy that was broken off).

    Writers and `prune_checkpoints` rename whole directories, so none of theirs is ever seen without one.
    """
    newest = existing[-1][0] if existing else -1
    for child in sorted(checkpoints.glob("step_*")):
        number = child.name.removeprefix("step_")
        if number.isdigit() and int(number) > newest and not (child / MANIFEST_NAME).is_file():
            older = f"resume with checkpoint.resume={newest}" if existing else "start over in another output"
            raise CorruptCheckpointError(
                f"{child} has no {MANIFEST_NAME}: it was not copied whole, and training would silently start again "
                f"from step {max(newest, 0)}. Copy it again, or remove it, or {older}."
            )


def _index(config: RunConfig, datasets: Sequence[ExampleDataset]) -> PackingIndex:
    function = build_packing_index if config.data.build_index else open_packing_index
    return function(
        datasets,
        data=config.data,
        sequence_length=config.batch.row_lengths,
        rows_needed=config.train_rows,
        seed=config.seed,
        directory=index_directory(config),
        guards=drop_flagged(config, datasets, build=config.data.build_index),
    )
