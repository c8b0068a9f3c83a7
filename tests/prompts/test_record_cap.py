"""The cap keeps the records with the smallest keys: as many as asked for, at every number of rows."""

import pytest

from megatron_xmtf.prompts.record_cap import RecordCap


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
