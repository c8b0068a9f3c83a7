"""Pass over the datasets of a mixture once, and flag what repeats and what it is evaluated on.

    sample      wording of each training template (`template_wording`)                     a fraction of the examples
    pass        decode -> units -> key, MinHash bands, finds; chunks in any process        every example once
    afterwards  equal keys -> duplicates;  equal bands -> candidates -> verified pairs     candidates once more

An example is flagged as a duplicate when an earlier one, in the order of the datasets and of their examples, is equal:
the first is kept. The same row under two templates is two examples on purpose, and not a duplicate: its inputs differ.
Memory, beside some 80 MB of tables and of chunks being worked on: 50 bytes an example at most (place and group 12,
flags 1, key 8, sorting 26), 0.5 GB for 10 million; the bands are 56 bytes an example in a temporary file beside the
result. The result has the same bytes for any number of workers.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_xmtf.data.array_file import map_new_array
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.guards.contamination import Finds, find_contamination
from megatron_xmtf.data.guards.evaluation_index import EvaluationIndex, EvaluationText, build_evaluation_index
from megatron_xmtf.data.guards.examples import Chunk, Corpus, chunk_texts, open_tokenizer
from megatron_xmtf.data.guards.fingerprints import BANDS, exact_keys, text_hashes
from megatron_xmtf.data.guards.flags import GuardFlags, flags_path, guards_key, load_flags
from megatron_xmtf.data.guards.near_duplicates import (
    PAIRS_PER_TASK,
    NearPair,
    PairTask,
    VerifyState,
    find_near_duplicates,
    near_duplicate_bands,
    verify_pairs,
)
from megatron_xmtf.data.guards.report import SHOWN_PAIRS, ContaminationTally, build_report
from megatron_xmtf.data.guards.settings import (
    CONTAMINATED_EXACT,
    CONTAMINATED_NGRAM,
    DUPLICATE,
    NEAR_DUPLICATE,
    GuardSettings,
)
from megatron_xmtf.data.guards.template_wording import SAMPLE, SMALLEST_HINT, salted, sample_wording
from megatron_xmtf.data.guards.text_units import split_units
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import ConfigError
from megatron_xmtf.files import atomic_directory
from megatron_xmtf.progress import Progress
from megatron_xmtf.worker_pool import WorkerPool

__all__ = ["scan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ScanState:
    """What a worker needs for the pass."""

    settings: GuardSettings
    index: EvaluationIndex | None
    """None: contamination is not looked for."""
    verify: VerifyState


@dataclass(frozen=True)
class _ChunkResult:
    """What the pass finds in one chunk."""

    chunk: Chunk
    keys: NDArray[np.uint64]
    """[examples]."""
    bands: NDArray[np.uint32] | None
    """[BANDS, examples]; None: near duplicates are not looked for."""
    finds: Finds | None


def scan(
    datasets: Sequence[ExampleDataset],
    *,
    tokenizer: Tokenizer,
    evaluation_texts: Sequence[EvaluationText],
    settings: GuardSettings,
    directory: Path | str,
    workers: int = 1,
    selected: Sequence[NDArray[np.bool_] | None] | None = None,
    show_progress: bool = True,
) -> GuardFlags:
    """Flag the examples of a mixture; a result that is there already is opened, not made again.

    Args:    datasets: the training datasets, in order: of equal examples the first is kept. tokenizer: theirs.
             evaluation_texts: of all tasks that the run is evaluated on. directory: where results are kept; this one
             is in a directory named by its key. workers: processes. selected: for each dataset the examples that are
             trained on, bool [examples], None for all; the others are neither flagged nor do they count as first.
    Raises:  ConfigError: no worker. DatasetError: a stored result is damaged. RankFailedError: a worker was killed.
             DiskFullError: no space.
    """
    if workers < 1:
        raise ConfigError(f"guards: workers={workers} is not a number of processes; use 1 or more.")
    key, key_inputs = guards_key(
        datasets, tokenizer=tokenizer, evaluation_texts=evaluation_texts, settings=settings, selected=selected
    )
    path = flags_path(directory, key)
    if not path.exists():
        corpus = Corpus(datasets, selected=selected or [None] * len(datasets))
        run = _Scan(corpus, tokenizer, evaluation_texts, settings, workers=workers, show_progress=show_progress)
        with _first_one_kept(path), atomic_directory(path) as temporary:
            GuardFlags(*run.flags_and_report(temporary), key, key_inputs, settings).write(temporary)
    return load_flags(path, key=key, lengths=[len(dataset) for dataset in datasets], settings=settings)


@contextmanager
def _first_one_kept(path: Path) -> Iterator[None]:
    """Leave the result of another process that finished the same one first."""
    try:
        yield
    except ConfigError:
        if not path.exists():
            raise
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


class _Scan:
    """One run of the guards."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        evaluation_texts: Sequence[EvaluationText],
        settings: GuardSettings,
        *,
        workers: int,
        show_progress: bool,
    ) -> None:
        self.corpus, self.tokenizer, self.evaluation_texts = corpus, tokenizer, evaluation_texts
        self.settings, self.workers, self.show_progress = settings, workers, show_progress
        self.has_near = settings.near_duplicates != "off"
        for part in corpus.parts if self.has_near else []:
            if "template" not in part.dataset.column_names:
                logger.warning(
                    "%s does not say which template an example is of: rows of one long template that differ in few "
                    "words may be flagged as near duplicates; look at the pairs in the report before dropping them",
                    part.dataset.prefix,
                )
        self.has_contamination = settings.contamination != "off" and len(evaluation_texts) > 0

    def flags_and_report(self, directory: Path) -> tuple[list[NDArray[np.uint8]], dict]:
        """Return flags [examples] of each dataset, and the report; `directory` is for temporary files."""
        wording, train_wording = self._wording()
        texts = self.evaluation_texts if self.has_contamination else []
        index = build_evaluation_index(texts, self.settings, train_wording=train_wording)
        tally = ContaminationTally(texts, [part.dataset for part in self.corpus.parts])
        state = _ScanState(
            self.settings,
            index if self.has_contamination else None,
            VerifyState(self.tokenizer.directory, wording, self.settings.jaccard),
        )
        flags = np.zeros(len(self.corpus), np.uint8)
        near: list[NearPair] = []
        left_out = 0
        with WorkerPool(self.workers, state=state) as pool:
            keys, bands_path = self._pass(pool, flags, tally, directory)
            duplicates = _flag_duplicates(keys, flags) if self.settings.duplicates != "off" else []
            if self.has_near:
                # An exact duplicate is no candidate: its first copy is.
                repeats = _later_copies(keys)[0] if self.settings.duplicates == "off" else flags & DUPLICATE
                del keys
                skipped = (repeats != 0) | self.corpus.in_small_groups(SMALLEST_HINT)
                near, left_out = self._flag_near(pool, flags, skipped, bands_path)
        per_dataset = self._per_dataset(flags)
        report = build_report(
            self.corpus,
            per_dataset,
            tokenizer=self.tokenizer,
            settings=self.settings,
            evaluation_texts=texts,
            index=index,
            tally=tally,
            duplicate_pairs=duplicates,
            near_duplicate_pairs=near,
            comparisons_left_out=left_out,
        )
        return per_dataset, report

    def _wording(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return template shingles of the training data, both ascending.

        Returns: tied to their groups, hints too, for near duplicates; and the certain ones of all groups.
        """
        nothing = np.empty(0, np.uint64)
        if not (self.has_near or self.has_contamination):
            return nothing, nothing
        tied, loose = [nothing], [nothing]
        state = (self.tokenizer.directory, self.settings.boilerplate)
        with (
            WorkerPool(self.workers, state=state) as pool,
            Progress(
                "guards sample", total=self.corpus.num_groups, unit="templates", enabled=self.show_progress
            ) as bar,
        ):
            for group, is_certain, hashes in pool.map(sample_wording, self.corpus.samples(SAMPLE)):
                tied.append(salted(hashes, np.full(len(hashes), group, np.int32)))
                if is_certain:
                    loose.append(hashes)
                bar.advance()
        return np.unique(np.concatenate(tied)), np.unique(np.concatenate(loose))

    def _pass(
        self, pool: WorkerPool, flags: NDArray[np.uint8], tally: ContaminationTally, directory: Path
    ) -> tuple[NDArray[np.uint64], Path]:
        """Look at every example once. Returns: its keys [positions]; the file of its bands [BANDS, positions]."""
        keys, bands_path = np.zeros(len(flags), np.uint64), directory / "bands.npy"
        bands = None
        if self.has_near and len(flags):
            bands = map_new_array(bands_path, np.uint32, (BANDS, len(flags)))
        with Progress("guards", total=len(flags), unit="examples", enabled=self.show_progress) as bar:
            for result in pool.map(_scan_chunk, self.corpus.chunks()):
                chunk, stop = result.chunk, result.chunk.first + len(result.chunk.ids)
                keys[chunk.first : stop] = result.keys
                if bands is not None:
                    bands[:, chunk.first : stop] = result.bands
                if result.finds is not None:
                    finds = result.finds
                    flags[chunk.first + finds.examples[finds.exact]] |= CONTAMINATED_EXACT
                    flags[chunk.first + finds.examples[finds.overlaps > 0]] |= CONTAMINATED_NGRAM
                    tally.add(chunk.dataset, chunk.first, chunk.ids, finds)
                bar.advance(len(chunk.ids))
        return keys, bands_path

    def _flag_near(
        self, pool: WorkerPool, flags: NDArray[np.uint8], skipped: NDArray[np.bool_], bands_path: Path
    ) -> tuple[list[NearPair], int]:
        if not len(flags):
            return [], 0
        bands = np.load(bands_path, mmap_mode="r")
        with Progress("guards verify", total=BANDS, unit="bands", enabled=self.show_progress) as bar:

            def verify(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
                return np.concatenate([np.empty(0, np.bool_), *pool.map(_verify, self._pair_tasks(pairs))])

            near, partners, left_out = find_near_duplicates(_each_band(bands, bar), skipped, verify=verify)
        bands_path.unlink()
        flags[near] |= NEAR_DUPLICATE
        return partners, left_out

    def _pair_tasks(self, pairs: NDArray[np.int64]) -> Iterator[PairTask]:
        for start in range(0, len(pairs), PAIRS_PER_TASK):
            some = pairs[start : start + PAIRS_PER_TASK]
            positions, places = np.unique(some, return_inverse=True)
            yield PairTask(self.corpus.pick(positions), places.reshape(some.shape))

    def _per_dataset(self, flags: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        result = []
        for number, part in enumerate(self.corpus.parts):
            whole = np.zeros(len(part.dataset), np.uint8)
            whole[part.ids] = flags[self.corpus.bases[number] : self.corpus.bases[number + 1]]
            result.append(whole)
        return result


def _scan_chunk(state: _ScanState, chunk: Chunk) -> _ChunkResult:
    """Fingerprint the examples of a chunk and look them up; runs in any process."""
    texts = chunk_texts(chunk, open_tokenizer(state.verify.tokenizer))
    units = split_units(texts)
    keys = exact_keys(text_hashes(units, texts))
    bands = finds = None
    if state.settings.near_duplicates != "off":
        bands = near_duplicate_bands(units, chunk.groups, state.verify.wording)
    if state.index is not None:
        finds = find_contamination(units, texts, state.index, state.settings)
    return _ChunkResult(chunk, keys, bands, finds)


def _verify(state: _ScanState, task: PairTask) -> NDArray[np.bool_]:
    """Verify pairs of near duplicates; runs in any process."""
    return verify_pairs(state.verify, task)


def _each_band(bands: NDArray[np.uint32], bar: Progress) -> Iterator[NDArray[np.uint32]]:
    """Read one band after the other into memory."""
    for band in bands:
        yield np.array(band)
        bar.advance()


def _later_copies(keys: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], list[tuple[int, int]]]:
    """Tell which positions have the key of an earlier one. Returns: bool [positions]; some pairs (later, earlier)."""
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), np.bool_)
    again[1:] = keys[order[1:]] == keys[order[:-1]]
    flags = np.zeros(len(keys), np.bool_)
    flags[order[again]] = True
    pairs = []
    for later in np.flatnonzero(flags)[:SHOWN_PAIRS].tolist():
        pairs.append((later, int(np.argmax(keys == keys[later]))))
    return flags, pairs


def _flag_duplicates(keys: NDArray[np.uint64], flags: NDArray[np.uint8]) -> list[tuple[int, int]]:
    again, pairs = _later_copies(keys)
    flags[again] |= DUPLICATE
    return pairs
