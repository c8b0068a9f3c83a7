"""The main job in miniature, stage by stage, through the same pieces that the other verbs call.

CLDR -> texts, questions -> render -> tokenizer, tiny model -> preprocess -> import -> pack -> train (46 languages)
     -> evaluate -> train (English answers to English prompts) -> evaluate -> export -> verify -> report
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from megatron_xmtf.config import ParallelConfig, load_config, write_config
from megatron_xmtf.config.load import config_from_mapping
from megatron_xmtf.config.schema import RunConfig
from megatron_xmtf.conversion.huggingface import import_huggingface
from megatron_xmtf.conversion.huggingface_export import export_huggingface
from megatron_xmtf.conversion.verify_logits import LogitsComparison, compare_logits
from megatron_xmtf.data.mixture import open_datasets
from megatron_xmtf.data.packing import build_packing_index, index_directory
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.tokenizer import Tokenizer
from megatron_xmtf.errors import CheckpointError, ConfigError, StoppedError
from megatron_xmtf.evaluation.evaluate import describe_checkpoint, evaluate_checkpoint
from megatron_xmtf.evaluation.results import TaskResult, write_results
from megatron_xmtf.evaluation.tasks import load_tasks
from megatron_xmtf.files import write_json
from megatron_xmtf.parallel.launch import joined_by_launcher, run_ranks
from megatron_xmtf.quickstart.clock import StageClock
from megatron_xmtf.quickstart.dataset import QuickstartData, collect_data, read_jsonl, render_prompts
from megatron_xmtf.quickstart.families import BLOOM, Family
from megatron_xmtf.quickstart.model import make_model, train_tokenizer
from megatron_xmtf.quickstart.outcome import Outcome, Probe, build_summary, closing_words
from megatron_xmtf.quickstart.page import write_page
from megatron_xmtf.quickstart.plan import Layout, Paths, Sizes, choose_layout
from megatron_xmtf.quickstart.run_configs import finetuning_config, pretraining_config
from megatron_xmtf.training.launch import train
from megatron_xmtf.training.trainer import TrainingResult

__all__ = ["run_quickstart"]

PROBE_LANGUAGES = ("en", "es", "hi", "ru", "sw", "zh")
"""Languages whose Monday the exported model is asked about through `transformers`; English was trained on."""
PROBE_TOKENS = 12


def run_quickstart(
    output: Path | str,
    *,
    family: Family = BLOOM,
    nproc: int = 4,
    sizes: Sizes | None = None,
    clock: StageClock | None = None,
) -> tuple[dict[str, Any], str]:
    """Run the whole path under `output` and return what `summary.json` holds, and closing words for a user.

    Args:    output: a directory that does not exist or is empty. nproc: local processes, 1, 2 or 4.
             sizes: in place of the family's own. clock: one that has timed the stage "load" already.
    Raises:  ConfigError: `output` is not empty, or another nproc.
    """
    root = Path(output).resolve()
    if joined_by_launcher():
        raise ConfigError("quickstart starts its own ranks (--nproc); run it without torchrun or srun.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"--output {output} is not an empty directory; remove it or name another one.")
    pretraining, finetuning = choose_layout(nproc)
    disable_progress_bar()  # transformers draws one for 29 tensors
    set_verbosity_error()  # it warns that an mT5's head is not tied, which is right; "verify" compares every logit
    clock = clock or StageClock(family.stage_budgets)
    return _Quickstart(family, sizes or family.sizes, Paths(root), pretraining, finetuning).run(clock)


@dataclass
class _Quickstart:
    family: Family
    sizes: Sizes
    paths: Paths
    pretraining: Layout
    finetuning: Layout

    def run(self, clock: StageClock) -> tuple[dict[str, Any], str]:
        paths, sizes = self.paths, self.sizes
        data = self._make_data(clock)
        num_parameters = self._make_model(clock, data)
        with clock.stage("preprocess", "tokenise once, into memory-mapped files"):
            for name, kind in (("pretrain", "text"), ("finetune", "pairs")):
                self._preprocess(name, kind)
        with clock.stage("import", "the Hugging Face model becomes a checkpoint that any parallel layout reads"):
            _in_own_process(import_huggingface, paths.initial_hf, paths.checkpoints / "initial")
        with clock.stage("pack", f"fit whole examples into rows of {self._row_words()}"):
            self._pack("pretrain", pretraining_config(self.family, sizes, paths, self.pretraining))
            self._pack("finetune", finetuning_config(self.family, sizes, paths, self.finetuning))
        what = f"{sizes.pretrain_steps} steps on plain texts in {sizes.languages} languages at {self.pretraining}"
        with clock.stage("pretrain", what):
            pretrained = self._train("pretrain", self.pretraining)
        with clock.stage("hand over", "export the pretrained model, import it as anybody's Hugging Face model"):
            _in_own_process(export_huggingface, paths.run("pretrain"), paths.pretrained_hf)
            _in_own_process(import_huggingface, paths.pretrained_hf, paths.checkpoints / "pretrained")
        with clock.stage("evaluate before", f"English prompts, {sizes.languages} languages, at {self.finetuning}"):
            before = self._evaluate(paths.checkpoints / "pretrained", "evaluation_before")
        what = f"{sizes.finetune_steps} steps on English prompts and English answers alone at {self.finetuning}"
        with clock.stage("finetune", what):
            finetuned = self._train("finetune", self.finetuning)
        with clock.stage("evaluate after", "the same questions"):
            after = self._evaluate(paths.run("finetune"), "evaluation_after")
        with clock.stage("export", "the checkpoint becomes a Hugging Face model"):
            _in_own_process(export_huggingface, paths.run("finetune"), paths.hf)
        with clock.stage("verify", "open it in transformers, compare logits with our engine's"):
            logits, probes = self._verify(data)
        outcome = Outcome(
            family=self.family,
            sizes=sizes,
            paths=paths,
            pretraining_layout=self.pretraining,
            finetuning_layout=self.finetuning,
            num_parameters=num_parameters,
            facts=data.facts,
            pretrained=pretrained,
            finetuned=finetuned,
            before=before,
            after=after,
            logits=logits,
            probes=probes,
        )
        with clock.stage("report", "report.html and summary.json"):
            write_page(outcome, clock)
        summary = build_summary(outcome, clock)
        write_json(paths.root / "summary.json", summary)
        return summary, closing_words(outcome, clock)

    def _make_data(self, clock: StageClock) -> QuickstartData:
        with clock.stage("facts", "what CLDR says in each language, as texts and questions"):
            data = collect_data(self.sizes, self.paths)
            print(
                f"        {len(data.facts)} languages, {len(data.texts):,} texts; {len(data.training):,} English "
                f"questions to finetune on, {len(data.evaluation):,} to evaluate"
            )
        with clock.stage("render", "questions x English prompt templates"):
            print(f"        {render_prompts(data, self.paths):,} records")
        return data

    def _make_model(self, clock: StageClock, data: QuickstartData) -> int:
        with clock.stage("model", f"a byte-level BPE tokenizer, {self.family.title} of random weights"):
            prompts = [record["inputs"] for record in read_jsonl(self.paths.data / "finetune.jsonl")]
            train_tokenizer(
                [*data.texts, *prompts], self.paths.tokenizer, family=self.family, vocab_size=self.sizes.vocab_size
            )
            arguments = (self.paths.tokenizer, self.paths.initial_hf, self.family, self.sizes)
            num_parameters: int = _in_own_process(make_model, *arguments)
            print(f"        {self.sizes.vocab_size:,} tokens, {num_parameters:,} parameters")
        return num_parameters

    def _row_words(self) -> str:
        lengths = self.family.row_lengths(self.sizes)
        return " and ".join(f"{tokens} tokens ({name})" for name, tokens in lengths.items())

    def _preprocess(self, name: str, kind: Any) -> None:
        manifest = preprocess(
            [self.paths.data / f"{name}.jsonl"],
            tokenizer=self.paths.tokenizer,
            output_prefix=self.paths.data / name,
            kind=kind,
        )
        print(f"        {name}: {manifest['counts']['kept']:,} examples, {sum(manifest['tokens'].values()):,} tokens")

    def _pack(self, name: str, values: dict[str, Any]) -> None:
        """Write a run's configuration and build the packing index that it reads."""
        config = config_from_mapping(values, RunConfig, source=f"the quickstart's {name}.yaml")
        write_config(config, self.paths.config(name))
        datasets = open_datasets(
            config.data.training_datasets, batch=config.batch, tokenizer=Tokenizer.load(self.paths.tokenizer)
        )
        index = build_packing_index(
            datasets,
            data=config.data,
            sequence_length=config.batch.row_lengths,
            rows_needed=config.train_rows,
            seed=config.seed,
            directory=index_directory(config),
        )
        statistics = index.statistics
        print(f"        {name}: {statistics['rows']:,} rows, {100 * statistics['fill_fraction']:.1f} % full")

    def _train(self, name: str, layout: Layout) -> TrainingResult:
        result = train(load_config(self.paths.config(name)), nproc=layout.world_size)
        if result["stopped_by"] is not None:
            raise StoppedError(f"{name} was stopped by {result['stopped_by']}; start the same command again.")
        return result

    def _evaluate(self, checkpoint: Path, name: str) -> list[TaskResult]:
        results = evaluate_checkpoint(
            checkpoint,
            load_tasks([self.paths.tasks]),
            parallel=_parallel_config(self.finetuning),
            world_size=self.finetuning.world_size,
        )
        write_results(self.paths.root / name / "results.json", describe_checkpoint(checkpoint), results)
        return results

    def _verify(self, data: QuickstartData) -> tuple[LogitsComparison, list[Probe]]:
        checkpoint = describe_checkpoint(self.paths.run("finetune")).model
        logits = compare_logits(
            checkpoint,
            self.paths.hf,
            parallel=_parallel_config(self.finetuning),
            world_size=self.finetuning.world_size,
        )
        if not logits.within_tolerance:
            raise CheckpointError(
                f"{self.paths.hf} and {checkpoint} differ by {logits.max_abs_difference:.3g} in a logit, limit "
                f"{logits.limit:.3g}: the export is not the model that was trained. Please report this."
            )
        print(f"        largest difference of a logit {logits.max_abs_difference:.2g}; greedy answers:")
        asked = [data.facts[language] for language in PROBE_LANGUAGES if language in data.facts]
        prompts = [f"What comes after {facts.days[0]}?" for facts in asked]
        answers: list[str] = _in_own_process(_ask_transformers, self.paths.hf, prompts, self.family)
        probes = [
            Probe(language=facts.language, prompt=prompt, answer=answer, right_answer=facts.days[1])
            for facts, prompt, answer in zip(asked, prompts, answers, strict=True)
        ]
        for probe in probes:
            print(
                f"        {probe.prompt} {probe.answer}" + ("" if probe.is_right else f"  (it is {probe.right_answer})")
            )
        return logits, probes


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that runs torch in a forked process: torch's threads here would not survive the next fork."""
    return run_ranks(function, world_size=1, arguments=arguments)[0]


def _parallel_config(layout: Layout) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
    )


def _ask_transformers(directory: Path, prompts: list[str], family: Family) -> list[str]:
    """Open the exported directory as any user does, and let it answer prompts greedily.

    Raises:  CheckpointError: `AutoTokenizer` and ours give other ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = family.open_model(directory).eval()
    own = Tokenizer.load(directory)
    answers = []
    for prompt, expected in zip(prompts, own.encode_batch(prompts), strict=True):
        if family.reads_eos:
            expected = [*expected, own.eos_id]
        ids = tokenizer(prompt, return_tensors="pt")
        if ids["input_ids"][0].tolist() != expected:
            raise CheckpointError(
                f"AutoTokenizer reads {prompt!r} in {directory} as {ids}, preprocessing as {expected}."
            )
        with torch.no_grad():
            written = model.generate(
                ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=PROBE_TOKENS, do_sample=False
            )[0]
        # A decoder-only model hands its prompt back as well.
        answer = written if model.config.is_encoder_decoder else written[len(expected) :]
        answers.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    return answers
