"""The cap keeps the records with the smallest keys: as many as asked for, at every number of rows."""

import pytest

from megatron_xmtf.prompts.jobs.record_cap import RecordCap, smallest_keys


@pytest.mark.parametrize("rows", [1, 49, 50, 51, 101, 256, 300, 1200])
@pytest.mark.parametrize("cap", [1, 50])
def test_exactly_the_smallest_keys_are_kept(rows: int, cap: int) -> None:
    ids = [f"row {number}" for number in range(rows)]
    templates = ["ask", "ask+cot"]
    record_cap = RecordCap(cap, templates, seed=3)
    written: list[tuple[int, str, int]] = []  # (template, id, key) of what is written as the chunks come
    keys_of: dict[tuple[int, str], int] = {}
    for chunk, start in enumerate(range(0, rows, 40)):
        chunk_ids = ids[start : start + 40]
        keys = record_cap.keys(chunk_ids)
        wanted = record_cap.rows_to_render(chunk, keys) or [None] * len(templates)
        rendered = [
            (row, template)
            for row in range(len(chunk_ids))
            for template, only in enumerate(wanted)
            if only is None or row in only
        ]
        keys_of |= {(t, one): int(keys[row, t]) for row, one in enumerate(chunk_ids) for t in range(len(templates))}
        for (row, template), allowed in zip(rendered, record_cap.merge(rendered, keys), strict=True):
            if allowed:
                written.append((template, chunk_ids[row], int(keys[row, template])))
    for template, threshold in enumerate(record_cap.final_thresholds()):
        kept = [one for number, one, key in written if number == template and key <= threshold]
        smallest = sorted(ids, key=lambda one: keys_of[template, one])[:cap]
        assert kept == [one for one in ids if one in set(smallest)], "the smallest keys, in the order of the rows"


@pytest.mark.parametrize(("rows", "count"), [(3, 4), (4, 4), (5, 4), (25_000, 70)])
def test_bounds_are_the_smallest_keys(rows: int, count: int) -> None:
    ids = [f"row {number}" for number in range(rows)]
    names = ["ask", "ask+cot"]
    bounds = smallest_keys(iter(ids), count=count, names=names, seed=3)
    keys = RecordCap(1, names, seed=3).keys(ids)
    for template, bound in enumerate(bounds.tolist()):
        expected = sorted(keys[:, template].tolist())[count - 1] if rows > count else 2**64 - 1
        assert bound == expected


def test_only_templates_that_fell_short_are_tried_without_a_bound() -> None:
    ids = [f"row {number}" for number in range(40)]
    names = ["ask", "ask+cot"]
    bounds = smallest_keys(ids, count=12, names=names, seed=3)
    cap = RecordCap(10, names, seed=3, upper_bounds=bounds)
    keys = cap.keys(ids)
    wanted = cap.rows_to_render(0, keys)
    assert wanted is not None and [len(rows or ids) for rows in wanted] == [12, 12]
    # The second template makes nothing of three of its rows.
    rendered = [(row, 0) for row in wanted[0] or []] + [(row, 1) for row in (wanted[1] or [])[3:]]
    cap.merge(sorted(rendered), keys)
    widened = cap.widened_bounds()
    assert widened is not None and widened.tolist() == [int(bounds[0]), 2**64 - 1]
