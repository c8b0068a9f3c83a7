"""The parts of a render job: one entry in one language each, with everything found and checked before a row is read.

    job     entries: xcopa (et, zh), gsm8k (en)
    parts   xcopa et    sources, 17 posed templates, 17 files
            xcopa zh    sources, 22 posed templates, 22 files
            gsm8k en    sources,  6 posed templates,  6 files, exemplars from its own rows

A part is what is resumed: it has a key, a hash of all that decides its records (templates, settings, size and time of
the source files), and a finished part with the same key is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_xmtf.errors import ConfigError, MissingError, TemplateError, nearest_names
from megatron_xmtf.files import sha256_json
from megatron_xmtf.prompts.jobs.output_names import output_name
from megatron_xmtf.prompts.jobs.placeholders import Placeholders
from megatron_xmtf.prompts.jobs.prompt_language import choose_templates, named_templates, prompt_language_of
from megatron_xmtf.prompts.jobs.render_job import (
    TRAINING_SPLIT,
    EntrySettings,
    ExemplarSettings,
    RenderJob,
    SourceValue,
    TemplateFiles,
)
from megatron_xmtf.prompts.rendering.chunk_renderer import OnError
from megatron_xmtf.prompts.source_rows import require_sources
from megatron_xmtf.prompts.sources import Source, source_from_mapping
from megatron_xmtf.prompts.templates.delimiters import declared_delimiters
from megatron_xmtf.prompts.templates.options import declared_option_styles
from megatron_xmtf.prompts.templates.template import Template
from megatron_xmtf.prompts.templates.template_files import load_templates
from megatron_xmtf.prompts.templates.variants import PosedTemplate, parse_variant, pose_templates

__all__ = ["RenderPart", "plan_parts"]

FORMAT = 1
"""Raised when the same job makes other bytes than before."""


@dataclass(frozen=True)
class RenderPart:
    """One entry of a job in one language."""

    name: str
    """For messages: dataset, config, split, language."""
    language: str
    prompt_language: str
    sources: tuple[Source, ...]
    posed: tuple[PosedTemplate, ...]
    files: tuple[str, ...]
    """Of each posed template, relative to the output directory."""
    not_made: Mapping[str, str]
    """Posed templates that do not exist, and why."""
    missing_localised: bool
    metadata: Mapping[str, str | None]
    exemplar_sources: tuple[Source, ...]
    exemplars: ExemplarSettings
    seed: int
    cap: int | None
    limit: int | None
    on_error: OnError

    def key(self) -> str:
        """Return the hash of all that decides the records."""
        values = {
            "format": FORMAT,
            "posed": [dataclasses.asdict(posed) for posed in self.posed],
            "files": self.files,
            "metadata": dict(self.metadata),
            "sources": [_identity(source) for source in self.sources],
            "exemplar_sources": [_identity(source) for source in self.exemplar_sources],
            "exemplars": [self.exemplars.pool, self.exemplars.max_characters],
            "options": [self.seed, self.cap, self.limit, self.on_error],
        }
        return sha256_json(values)


def plan_parts(job: RenderJob, *, directory: Path, job_name: str = "job") -> list[RenderPart]:
    """Find and check everything a job names.

    Args:    directory: what its relative paths are relative to. job_name: what to call it in errors.
    Raises:  ConfigError, TemplateError, MissingError: whatever is wrong with the job, its templates and its files.
    """
    loaded: dict[Path, list[Template]] = {}
    parts = []
    for entry in job.entries:
        parts += _entry_parts(job, entry, directory, job_name, loaded)
    owners: dict[str, str] = {}
    for part in parts:
        for file, posed in zip(part.files, part.posed, strict=True):
            owner = f"{part.name}, template {posed.name!r}"
            if file in owners:
                raise ConfigError(
                    f"{job_name}: {owners[file]} and {owner} are both written to {file}; give one of them another "
                    "config or split, or exclude the template."
                )
            owners[file] = owner
    return parts


def _entry_parts(
    job: RenderJob, entry: EntrySettings, directory: Path, job_name: str, loaded: dict[Path, list[Template]]
) -> list[RenderPart]:
    languages = []
    for language, given in entry.language_names().items():
        names = {name: value for name, value in given.items() if name != "prompt"}
        fill = Placeholders(
            {**names, "language": language, "prompt_language": given.get("prompt") or prompt_language_of(language)},
            where=f"{job_name}: {entry.dataset} ({language})",
        )
        languages.append((fill, *_template_files(entry, fill, directory, loaded)))
    known = {template.name for _, english, localised in languages for template in (*english, *localised)}
    for pattern in entry.include:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise TemplateError(
                f"{job_name}: {entry.dataset}: no template is named {pattern!r}; {nearest_names(pattern, known)}."
            )
    parts = []
    for fill, english, localised in languages:
        chosen = choose_templates(
            named_templates(english, include=entry.include, exclude=entry.exclude),
            named_templates(localised, include=entry.include, exclude=entry.exclude),
            prompts=entry.prompts or job.prompts or "english",
            prompt_language=fill.prompt_language,
            missing=entry.missing or job.missing or "error",
            translation=entry.translation or job.translation or "any",
            where=fill.where,
        )
        parts.append(_part(job, entry, fill, chosen.templates, chosen.missing, directory))
    return parts


def _part(
    job: RenderJob,
    entry: EntrySettings,
    fill: Placeholders,
    templates: list[Template],
    missing: bool,
    directory: Path,
) -> RenderPart:
    where = fill.where
    config = fill.text(entry.config) if entry.config is not None else None
    posed, not_made = pose_templates(
        templates,
        [parse_variant(name) for name in entry.variants or job.variants or ["plain"]],
        option_styles=declared_option_styles(entry.option_styles or job.option_styles, where=where),
        delimiters=declared_delimiters(entry.delimiters or job.delimiters, where=where),
    )
    sources = _sources(entry.source, fill, directory, f"{where}: source")
    exemplars = entry.exemplars or ExemplarSettings()
    exemplar_sources: tuple[Source, ...] = ()
    if any(one.variant.shots for one in posed):
        exemplar_sources = _exemplar_sources(entry, exemplars, sources, fill, directory, where)
    names = {"language": fill.language, "dataset": entry.dataset, "config": config, "split": entry.split}
    return RenderPart(
        name=", ".join(str(value) for value in (entry.dataset, config, entry.split, fill.language) if value),
        language=fill.language,
        prompt_language=fill.prompt_language,
        sources=sources,
        posed=tuple(posed),
        files=tuple(
            output_name(
                prefix=job.name,
                language=fill.language,
                dataset=entry.dataset,
                config=config,
                split=entry.split,
                template=one.name,
            )
            for one in posed
        ),
        not_made=not_made,
        missing_localised=missing,
        metadata={**names, "task": entry.task},
        exemplar_sources=exemplar_sources,
        exemplars=exemplars,
        seed=job.seed,
        cap=entry.max_records_per_template or job.max_records_per_template,
        limit=entry.limit or job.limit,
        on_error=entry.on_error or job.on_error or "raise",
    )


def _template_files(
    entry: EntrySettings, fill: Placeholders, directory: Path, loaded: dict[Path, list[Template]]
) -> tuple[list[Template], list[Template]]:
    """Return the templates of the file for English prompts and of that for the language; each file is read once."""
    files = entry.templates
    if isinstance(files, str):
        files = TemplateFiles(english=files, localised=files)
    found = []
    for name in (files.english, files.localised):
        path = directory / fill.text(name) if name is not None else None
        if path is not None and path not in loaded:
            _require_path(path, directory, fill.where)
            loaded[path] = load_templates(path)
        found.append(loaded[path] if path is not None else [])
    return found[0], found[1]


def _sources(
    values: SourceValue | list[SourceValue], fill: Placeholders, directory: Path, where: str
) -> tuple[Source, ...]:
    listed = values if isinstance(values, list) else [values]
    sources = tuple(source_from_mapping(fill.value(value), directory=directory, where=where) for value in listed)
    for source in sources:
        for path in source.paths:
            _require_path(path, directory, where)
    require_sources(sources)
    return sources


def _require_path(path: Path, directory: Path, where: str) -> None:
    if not path.exists():
        raise MissingError(
            f"{where}: {path.resolve()} does not exist; paths in a job are relative to the job file, which lies in "
            f"{directory.resolve()}."
        )


def _exemplar_sources(
    entry: EntrySettings,
    exemplars: ExemplarSettings,
    sources: tuple[Source, ...],
    fill: Placeholders,
    directory: Path,
    where: str,
) -> tuple[Source, ...]:
    """Return the training rows that few-shot variants draw from."""
    if exemplars.source is not None:
        return _sources(exemplars.source, fill, directory, f"{where}: exemplars")
    if not TRAINING_SPLIT.match(entry.split):
        raise ConfigError(
            f"{where}: variants with shots need training rows, and split {entry.split!r} has none; declare exemplars: "
            "{source: ..., split: train}, or leave the variants with shots out of this entry."
        )
    return sources


def _identity(source: Source) -> list[Any]:
    """Return what tells a source from what it was at an earlier run: its declaration, sizes and times of its files."""
    declared = {name: value for name, value in dataclasses.asdict(source).items() if value}
    files = []
    for path in source.paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            state = file.stat()
            files.append([str(file), state.st_size, state.st_mtime_ns])
    return [repr(sorted(declared.items())), files]
