"""Records to files: ids against transformers, any number of workers, every kind of bad line, kills at every step."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from transformers import AutoTokenizer

from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.example_writer import ExampleDatasetWriter
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.errors import ConfigError, DatasetError, DiskFullError, MissingError, RankFailedError, RecordError

GOOD = '{"inputs": "How many months?", "targets": "twelve"}'


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def many_records(count: int) -> list[str]:
    return [
        json.dumps({"inputs": f"Je, {n} + {n}? " * 20, "targets": f"ni {2 * n} " * (n % 7), "language": "sw"})
        for n in range(count)
    ]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def run(inputs: list[Path], tokenizer: Path, prefix: Path, **options: object) -> dict:
    return preprocess(inputs, tokenizer=tokenizer, output_prefix=prefix, show_progress=False, **options)


def test_ids_equal_transformers_and_megatron_reads_them(tmp_path: Path, tokenizer_directory: Path) -> None:
    pairs = [
        ("How many months?", "twelve"),
        ("一年有几个月？", "十二个月。"),
        ("double  space", " led"),
        ("a\nb", "c\nd"),
    ]
    source = write(tmp_path / "r.jsonl", *(json.dumps({"inputs": i, "targets": t}) for i, t in pairs))
    run([source], tokenizer_directory, tmp_path / "d")
    oracle = AutoTokenizer.from_pretrained(tokenizer_directory)
    inputs = MegatronDataset(str(tmp_path / "d_inputs_document"))
    targets = MegatronDataset(str(tmp_path / "d_targets_document"))
    for index, (text, answer) in enumerate(pairs):
        assert inputs[index].tolist() == oracle.encode(text, add_special_tokens=False)
        expected = [*oracle.encode(" " + answer, add_special_tokens=False), oracle.eos_token_id]
        assert targets[index].tolist() == expected
    assert inputs[0].dtype == np.uint16


def test_text_documents_end_with_eos(tmp_path: Path, tokenizer_directory: Path) -> None:
    source = write(tmp_path / "r.jsonl", '{"text": "twelve months"}', '{"text": " "}', '{"text": "一年"}')
    manifest = run([source], tokenizer_directory, tmp_path / "d", kind="text")
    oracle = AutoTokenizer.from_pretrained(tokenizer_directory)
    dataset = ExampleDataset.open(tmp_path / "d")
    documents = [dataset[index] for index in range(len(dataset))]
    assert [targets.tolist() for _, targets in documents] == [
        [*oracle.encode(text, add_special_tokens=False), oracle.eos_token_id] for text in ("twelve months", "一年")
    ]
    assert all(len(inputs) == 0 for inputs, _ in documents) and dataset.input_lengths.tolist() == [0, 0]
    assert manifest["counts"]["empty_text"] == 1 and manifest["target_prefix"] is None


def test_same_bytes_for_any_number_of_workers(tmp_path: Path, tokenizer_directory: Path) -> None:
    records = many_records(8000)  # several chunks of 1 MiB
    plain = write(tmp_path / "a.jsonl", *records[:6000])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(records[6000:]).encode()))  # no line end at its end
    for workers in (1, 3):
        run([plain, packed], tokenizer_directory, tmp_path / str(workers) / "d", workers=workers)
    one, three = files_of(tmp_path / "1"), files_of(tmp_path / "3")
    assert one == three
    dataset = ExampleDataset.open(tmp_path / "1" / "d", deep=True)
    kept = [n for n in range(8000) if n % 7]  # the target of every seventh record is empty
    assert len(dataset) == len(kept)
    oracle = AutoTokenizer.from_pretrained(tokenizer_directory)
    for index in (0, 1, 3000, len(kept) - 1):
        assert f"{kept[index]} + {kept[index]}?" in oracle.decode(dataset[index][0])


def test_empty_halves_are_dropped_as_pairs_and_counted(tmp_path: Path, tokenizer_directory: Path) -> None:
    """The reference wrote the other half, and every later pair was out of step."""
    rows = [("a", "1"), ("", "2"), ("c", ""), (" \n", "4"), ("e", "\t "), ("", ""), ("g", "</s>"), ("h", "8")]
    source = write(tmp_path / "r.jsonl", *(json.dumps({"inputs": i, "targets": t}) for i, t in rows), "", "  ")
    # Without a prefix, the target "</s>" is EOS alone.
    counts = run([source], tokenizer_directory, tmp_path / "d", target_prefix="")["counts"]
    assert counts["read"] == 8 and counts["kept"] == 2 and counts["blank_lines"] == 2
    assert counts["empty_inputs"] == 3 and counts["empty_targets"] == 3 and counts["malformed"] == 0
    dataset, oracle = ExampleDataset.open(tmp_path / "d"), AutoTokenizer.from_pretrained(tokenizer_directory)
    assert [tuple(map(oracle.decode, dataset[i])) for i in range(2)] == [("a", "1</s>"), ("h", "8</s>")]


def test_halves_that_the_normaliser_deletes_are_dropped(tmp_path: Path, tokenizer_directory: Path) -> None:
    content = json.loads((tokenizer_directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    rows = [("xx", "a"), ("a", "xxx"), ("a", "b")]
    source = write(tmp_path / "r.jsonl", *(json.dumps({"inputs": i, "targets": t}) for i, t in rows))
    counts = run([source], directory, tmp_path / "d")["counts"]
    assert (counts["empty_inputs"], counts["empty_targets"], counts["kept"]) == (1, 1, 1)


def test_nothing_kept_and_unreadable_files(tmp_path: Path, tokenizer_directory: Path) -> None:
    for lines, message in ((['{"inputs": "", "targets": "b"}'], "empty inputs: 1"), ([], "files are empty")):
        with pytest.raises(RecordError, match=message):
            run([write(tmp_path / "r.jsonl", *lines)], tokenizer_directory, tmp_path / "out" / "d")
    packed = tmp_path / "r.jsonl.gz"
    for damaged in (gzip.compress(GOOD.encode() * 100)[:-9], b"no gzip", gzip.compress(GOOD.encode())[:-4] + b"\0" * 4):
        packed.write_bytes(damaged)
        with pytest.raises(RecordError, match="damaged or truncated gzip"):
            run([packed], tokenizer_directory, tmp_path / "out" / "d")
    with pytest.raises(MissingError, match="does not exist"):
        run([tmp_path / "no.jsonl"], tokenizer_directory, tmp_path / "out" / "d")
    assert files_of(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("record_format", "field_map", "row", "expected"),
    [
        ("records", {"inputs": "q", "targets": "a"}, {"q": "x", "a": "y"}, ("x", " y</s>")),
        ("prompt_completion", {}, {"prompt": "x", "completion": "y"}, ("x", " y</s>")),
        ("instruction", {}, {"instruction": "do", "input": "", "output": "y"}, ("do", " y</s>")),
        ("instruction", {}, {"instruction": "do", "output": "y"}, ("do", " y</s>")),
        ("instruction", {}, {"instruction": "do", "input": "x", "output": "y"}, ("do\n\nx", " y</s>")),
        (
            "messages",
            {},
            {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "y"))]},
            ("s\n\nu", " y</s>"),
        ),
    ],
)
def test_record_formats(
    tmp_path: Path, tokenizer_directory: Path, record_format: str, field_map: dict, row: dict, expected: tuple
) -> None:
    source = write(tmp_path / "r.jsonl", json.dumps(row))
    run([source], tokenizer_directory, tmp_path / "d", record_format=record_format, field_map=field_map)
    oracle = AutoTokenizer.from_pretrained(tokenizer_directory)
    assert tuple(map(oracle.decode, ExampleDataset.open(tmp_path / "d")[0])) == expected


def test_formats_are_never_guessed(tmp_path: Path, tokenizer_directory: Path) -> None:
    source = write(tmp_path / "r.jsonl", '{"prompt": "x", "completion": "y"}')
    with pytest.raises(RecordError, match="no field 'inputs', its fields are: prompt, completion"):
        run([source], tokenizer_directory, tmp_path / "d")
    with pytest.raises(ConfigError, match="nearest: inputs"):
        run([source], tokenizer_directory, tmp_path / "d", field_map={"input": "x"})
    with pytest.raises(ConfigError, match="for pairs only"):
        run([source], tokenizer_directory, tmp_path / "d", kind="text", record_format="messages")
    user_last = write(
        tmp_path / "m.jsonl", '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}'
    )
    with pytest.raises(RecordError, match="not the assistant's"):
        run([user_last], tokenizer_directory, tmp_path / "d", record_format="messages")
    with pytest.raises(ConfigError, match="is a directory"):
        run([source], tokenizer_directory, tmp_path)
    with pytest.raises(ConfigError, match="workers=0"):
        run([source], tokenizer_directory, tmp_path / "d", workers=0)


def test_finished_output_is_kept_unless_overwritten(tmp_path: Path, tokenizer_directory: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", *many_records(20))
    prefix = tmp_path / "out" / "d"
    run([first], tokenizer_directory, prefix)
    before = files_of(prefix.parent)
    with pytest.raises(DatasetError, match="exists already.*--overwrite"):
        run([second], tokenizer_directory, prefix)
    bad = write(tmp_path / "c.jsonl", GOOD, "{")
    with pytest.raises(RecordError):  # a failed replacement leaves the old dataset
        run([bad], tokenizer_directory, prefix, overwrite=True)
    assert files_of(prefix.parent) == before
    run([second], tokenizer_directory, prefix, overwrite=True)
    assert len(ExampleDataset.open(prefix, deep=True)) == 17
    text = write(tmp_path / "t.jsonl", '{"text": "a"}')
    run([text], tokenizer_directory, prefix, overwrite=True, kind="text")
    assert set(files_of(prefix.parent)) == {"d.json", "d_columns.npz", "d_text_document.bin", "d_text_document.idx"}


def test_two_runs_do_not_write_one_prefix(tmp_path: Path, tokenizer_directory: Path) -> None:

    source = write(tmp_path / "r.jsonl", GOOD)
    with ExampleDatasetWriter(tmp_path / "out" / "d", kind="pairs", dtype=np.dtype(np.int32), overwrite=False):
        with pytest.raises(DatasetError, match="another run is writing"):
            run([source], tokenizer_directory, tmp_path / "out" / "d")
    assert files_of(tmp_path / "out") == {}


def test_full_disk_leaves_nothing(tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, prefix = write(tmp_path / "r.jsonl", *many_records(3)), tmp_path / "out" / "d"

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("os.fsync", "os.replace", "zipfile.ZipFile.open"):
        with monkeypatch.context() as patch:
            patch.setattr(name, no_space)
            with pytest.raises(DiskFullError, match="no space left"):
                run([source], tokenizer_directory, prefix)
        assert files_of(tmp_path / "out") == {}


def test_killed_worker_ends_the_run(tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    # More chunks of 1 MiB than two workers are given ahead (6): some are not handed out when the first comes back.
    source = write(tmp_path / "r.jsonl", *many_records(24_000))
    assert source.stat().st_size > 8 << 20
    add = ExampleDatasetWriter.add

    def add_and_kill(*arguments: object, **options: object) -> None:
        add(*arguments, **options)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(ExampleDatasetWriter, "add", add_and_kill)
        with pytest.raises(RankFailedError, match="worker processes was killed.* first [0-9,]+ records is kept in"):
            run([source], tokenizer_directory, tmp_path / "out" / "d", workers=2)
    run([source], tokenizer_directory, tmp_path / "out" / "d")
    run([source], tokenizer_directory, tmp_path / "undisturbed" / "d")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_workers_end_when_the_run_is_killed(tmp_path: Path, tokenizer_directory: Path) -> None:
    program = (
        "from megatron_xmtf.data import encode, records\n"
        "from megatron_xmtf.data.encode import *\n"
        "from megatron_xmtf.data.tokenizer import Tokenizer\n"
        "from pathlib import Path\n"
        "import itertools, multiprocessing\n"
        "def main():\n"
        f"    t = Tokenizer.load({str(tokenizer_directory)!r})\n"
        "    s = EncodeSettings(t.directory, 'pairs', 'records', (), ' ', 'error')\n"
        '    c = records.LineChunk(\'x\', 1, b\'{"inputs": "a", "targets": "b"}\\n\', 0)\n'
        "    for n, _ in enumerate(encode_chunks(itertools.repeat(c), tokenizer=t, settings=s, workers=2)):\n"
        "        if n == 20: print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "if __name__ == '__main__': main()\n"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    # End of file: the workers, who inherited the pipe, are gone too; otherwise TimeoutExpired.
    assert process.communicate(timeout=60)[0] == ""
