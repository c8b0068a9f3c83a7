"""Say what a person should look at in a data plan, in words with the figures and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from megatron_xmtf.planning.data_plan import DataPlan

__all__ = ["PlanWarning", "data_warnings"]

MANY_EPOCHS = 4.0
"""Repeats up to here are worth about as much as new data; beyond, less and less. Source: Muennighoff et al. 2023,
"Scaling Data-Constrained Language Models", section 5."""
SMALL_LOSS_FRACTION = 0.005
"""Below this part of the loss a language is easily forgotten by whoever reads the plan."""
LOST_FRACTION = 0.05
"""Part of a group's records that are dropped, cut or empty before it is worth a word."""
LOW_FILL_FRACTION = 0.95
"""Best fit reaches 0.995 on realistic lengths; below this, a twentieth of the compute goes into padding."""
OUT_OF_PROPORTION = 4.0
"""How much larger a dataset's part of the loss may be than its part of the examples."""
UNREACHED_FRACTION = 0.8
"""A component that gets less than this part of what it wanted, or more than 1 / this."""


NEAR_FRACTION = 0.005
"""A component this near to what it wanted is where rounding to whole examples and rows put it."""
OTHER_UNIT_FRACTION = 0.1
"""How far a dataset's part of the loss may be from its part of a mixture that counts in another unit."""


class PlanWarning(TypedDict):
    """One warning."""

    kind: str
    """contamination, validation, repeats, rare, lost, unread, duplicates, limited, fill, loss, unknown or warmup."""
    message: str
    group: dict[str, str]
    """What it is about: dataset, language, component; empty for the run."""


def data_warnings(plan: DataPlan) -> list[PlanWarning]:
    """Find what is worth a word, the gravest first."""
    found = [
        *_contaminated(plan),
        *_held_out(plan),
        *_unread(plan),
        *_lost(plan),
        *_duplicates(plan),
        *_repeats(plan),
        *_limited(plan),
        *_run(plan),
        *_out_of_proportion(plan),
        *_other_unit(plan),
    ]
    return [{"kind": kind, "message": message, "group": group} for kind, group, message in found]


Found = Iterator[tuple[str, dict[str, str], str]]


def _contaminated(plan: DataPlan) -> Found:
    """Word every dataset that holds texts of an evaluation task: few are too many."""
    if "contaminated" not in plan["guards"]["checked"]:
        return
    read = (
        "they are not read"
        if plan["guards"]["settings"]["contamination"] == "drop"
        else ("leave them out with data.guards.contamination=drop")
    )
    for row in plan["entries"]:
        if row["contaminated"]:
            tasks = sorted(
                {part["task"] for part in plan["guards"]["contamination"] if part["dataset"] == row["entry"]}
            )
            yield (
                "contamination",
                {"entry": row["entry"]},
                f"{row['contaminated']:,} of the {row['selected']:,} {row['entry']} records hold texts of "
                f"{_listed(tasks)}, which the run is evaluated on: {read}.",
            )


def _held_out(plan: DataPlan) -> Found:
    for part in plan["validation"]:
        if part["trained_on"]:
            yield (
                "validation",
                {"validation": part["name"]},
                f"{percent(part['trained_on'] / part['selected'])} of the validation records of {part['name']} are of "
                "documents that are trained on: give both a split, such as 0:0.95 and 0.95:1.",
            )


def _duplicates(plan: DataPlan) -> Found:
    for name, words in (("duplicates", "repeat an earlier one"), ("near_duplicates", "are nearly an earlier one")):
        if name not in plan["guards"]["checked"] or plan["guards"]["settings"][name] == "drop":
            continue
        for row in plan["datasets"]:
            if row["selected"] and row[name] / row["selected"] >= LOST_FRACTION:
                yield (
                    "duplicates",
                    {"dataset": row["dataset"]},
                    f"{percent(row[name] / row['selected'])} of the {row['dataset']} records ({row[name]:,} of "
                    f"{row['selected']:,}) {words}: leave them out with data.guards.{name}=drop.",
                )


def _unread(plan: DataPlan) -> Found:
    for column in ("dataset", "language"):
        for row in plan["datasets" if column == "dataset" else "languages"]:
            if row["selected"] and not row["examples"]:
                why = "none can be read" if not row["available"] else "none is drawn in this run"
                yield "unread", {column: row[column]}, f"{row[column]}: {row['selected']:,} records, and {why}."


def _lost(plan: DataPlan) -> Found:
    """Word what is dropped, cut or empty, by language and by dataset, where it is more than a few."""
    longer = "batch.encoder_length or batch.decoder_length" if plan["sides"] else "batch.sequence_length"
    remedies = {
        "dropped": f"are too long and dropped: raise {longer}, or set data.long_examples to truncate_inputs_left",
        "truncated": f"lose a part of their inputs: raise {'batch.encoder_length' if plan['sides'] else longer}",
        "empty": "have no target: look at the templates with `xmtf inspect`",
    }
    for name, words in remedies.items():
        for column in ("dataset", "language"):
            rows = plan["datasets" if column == "dataset" else "languages"]
            lost = [(row[name] / row["selected"], row) for row in rows if row["examples"]]
            lost = sorted((entry for entry in lost if entry[0] >= LOST_FRACTION), key=lambda entry: -entry[0])
            if not lost or len(rows) == 1 and column == "language":
                continue
            part, row = lost[0]
            others = _listed([f"{percent(part)} of {row[column]}" for part, row in lost[1:]])
            message = (
                f"{percent(part)} of the {row[column]} records ({row[name]:,} of {row['selected']:,})"
                f"{f', {others}' if others else ''} {words}."
            )
            yield "lost", {column: ", ".join(row[column] for _, row in lost)}, message


def _listed(words: Sequence[str], most: int = 8) -> str:
    """Join the first of some words, and say how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _repeats(plan: DataPlan) -> Found:
    """Word what is read often; where the whole run repeats its data, only what goes well beyond that."""
    whole = plan["run"]["epochs"]
    if whole > MANY_EPOCHS:
        yield (
            "repeats",
            {},
            f"the run reads its data {whole:,.1f} times: give it fewer steps (now {plan['run']['steps']:,}) or more "
            "data.",
        )
    limit = max(MANY_EPOCHS, 2 * whole)
    for row in plan["datasets"]:
        if row["epochs"] > limit and len(plan["datasets"]) > 1:
            yield (
                "repeats",
                {"dataset": row["dataset"]},
                f"{row['dataset']} is read {row['epochs']:,.1f} times and is {percent(row['loss_fraction'])} of the "
                "loss: lower its weight, or cap it with max_epochs.",
            )
    for row in plan["languages"]:
        if row["epochs"] > limit and len(plan["languages"]) > 1:
            yield (
                "repeats",
                {"language": row["language"]},
                f"{row['language']} is {percent(row['loss_fraction'])} of the loss, and its {row['available']:,} "
                f"examples are read {row['epochs']:,.1f} times.",
            )
    rare = [row for row in plan["languages"] if 0 < row["loss_fraction"] < SMALL_LOSS_FRACTION]
    if rare:
        named = _listed([f"{row['language']} {percent(row['loss_fraction'])}" for row in rare])
        yield (
            "rare",
            {},
            f"{len(rare)} {'language is' if len(rare) == 1 else 'languages are'} less than "
            f"{percent(SMALL_LOSS_FRACTION)} of the loss each: {named}.",
        )


def _limited(plan: DataPlan) -> Found:
    whole = {"examples": "examples", "tokens": "tokens", "target_tokens": "target tokens", None: "examples"}
    for part in plan["components"]:
        wanted, actual = part["wanted_share"], part["share"]
        is_near = abs(actual - wanted) < NEAR_FRACTION and part["limited_by"] is None
        if is_near or UNREACHED_FRACTION * wanted <= actual <= wanted / UNREACHED_FRACTION:
            continue
        why = {
            "max_epochs": "its max_epochs allows no more",
            "floor": "a floor holds it",
            None: "others were used up" if actual > wanted else "the run is too short to reach it",
        }[part["limited_by"]]
        yield (
            "limited",
            {"component": part["name"]},
            f"{part['name']} should be {percent(wanted)} of the {whole[plan['unit']]} and is {percent(actual)}: {why}.",
        )


def _run(plan: DataPlan) -> Found:
    run = plan["run"]
    if run["row_fill"]["mean_fraction"] < LOW_FILL_FRACTION:
        yield (
            "fill",
            {},
            f"rows are only {percent(run['row_fill']['mean_fraction'])} filled: most examples are longer than half a "
            f"row of {plan['sequence_length']:,} tokens, or there are too few of them for a longer row.",
        )
    if run["warmup_steps"] * 2 > run["steps"]:
        yield (
            "warmup",
            {},
            f"{run['warmup_steps']:,} of the {run['steps']:,} steps are warm-up: lower schedule.lr_warmup_steps.",
        )
    for row in plan["languages"]:
        if row["language"] == "(unknown)" and len(plan["languages"]) > 1:
            yield (
                "unknown",
                {"language": row["language"]},
                f"{percent(row['loss_fraction'])} of the loss is of records that name no language; figures by "
                "language leave them out.",
            )


def _other_unit(plan: DataPlan) -> Found:
    """Word a mixture that counts tokens where the loss counts targets: its parts are not those of the loss."""
    if plan["unit"] in (None, "examples") or (plan["unit"], plan["normalization"]) == ("target_tokens", "target_token"):
        return
    shares: dict[str, float] = {}
    for part in plan["components"]:
        shares[part["dataset"]] = shares.get(part["dataset"], 0.0) + part["share"]
    distances = [(abs(row["loss_fraction"] - shares.get(row["entry"], 0.0)), row) for row in plan["entries"]]
    distance, row = max(distances, key=lambda entry: entry[0])
    if distance > OTHER_UNIT_FRACTION:
        yield (
            "loss",
            {"entry": row["entry"]},
            f"{row['entry']} is {percent(shares.get(row['entry'], 0.0))} of the mixture, which counts "
            f"{str(plan['unit']).replace('_', ' ')}, but {percent(row['loss_fraction'])} of the loss: "
            f"loss.normalization={plan['normalization']} counts otherwise. Bring the two together.",
        )


def _out_of_proportion(plan: DataPlan) -> Found:
    if plan["normalization"] != "target_token" or plan["unit"] not in (None, "examples"):
        return
    for row in plan["datasets"]:
        if row["example_fraction"] and row["loss_fraction"] > OUT_OF_PROPORTION * row["example_fraction"] + 0.02:
            yield (
                "loss",
                {"dataset": row["dataset"]},
                f"{row['dataset']} is {percent(row['example_fraction'])} of the examples but "
                f"{percent(row['loss_fraction'])} of the loss, since its targets are long; "
                "loss.normalization=target_sequence weighs each target the same.",
            )


def percent(fraction: float) -> str:
    """Word a fraction in percent, small ones with more digits.

    >>> [percent(value) for value in (0.5, 0.123, 0.00312, 0.00001, 0.0, 1.0)]
    ['50 %', '12.3 %', '0.31 %', '< 0.01 %', '0 %', '100 %']
    """
    value = 100 * fraction
    if 0 < value < 0.01:
        return "< 0.01 %"
    return f"{value:.1f} %".replace(".0 %", " %") if value >= 1 else f"{value:.2g} %"
