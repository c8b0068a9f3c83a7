"""Records to files: ids against transformers, any number of workers, every kind of bad line, kills at every step."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from transformers import AutoTokenizer

from megatron_xmtf.cli import main
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.example_writer import ExampleDatasetWriter
from megatron_xmtf.data.line_chunks import read_chunks
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


BAD_LINES: list[tuple[str | bytes, str, str]] = [
    ('{"inputs": "a", "targets": "b"', "invalid_json", "not JSON: Expecting ',' delimiter at column 31"),
    ("inputs, targets", "invalid_json", "not JSON"),
    ('{"inputs": "a", "targets": "b"} {}', "invalid_json", "Extra data"),
    ('{"inputs": "a", "targets": "b", "id": NaN}', "invalid_json", "NaN is not JSON"),
    ("[" * 200_000, "invalid_json", "nested too deeply"),
    ('{"inputs": "a", "targets": "b", "id": ' + "9" * 5000 + "}", "invalid_json", "a number is too long"),
    ('["a", "b"]', "not_an_object", "it is a list, not an object"),
    ("null", "not_an_object", "it is null, not an object"),
    ('"text"', "not_an_object", "it is a string"),
    ("3", "not_an_object", "it is a number"),
    ('{"inputs": "a"}', "missing_field", "there is no field 'targets', its fields are: inputs"),
    ("{}", "missing_field", "its fields are: none"),
    ('{"inputs": 3, "targets": "b"}', "not_a_string", "field 'inputs' is a number, not a string"),
    ('{"inputs": "a", "targets": null}', "not_a_string", "field 'targets' is null"),
    ('{"inputs": "a", "targets": ["b"]}', "not_a_string", "field 'targets' is a list"),
    ('{"inputs": "a", "targets": "b", "language": 7}', "not_a_string", "field 'language' is a number"),
    ('{"inputs": "a", "targets": "b", "inputs": "c"}', "duplicate_key", "a key appears twice"),
    (b'{"inputs": "caf\xe9", "targets": "b"}', "invalid_utf8", "byte 16 is not UTF-8"),
    (b'{"inputs": "\xed\xa0\x80", "targets": "b"}', "invalid_utf8", "is not UTF-8"),
    ('{"inputs": "\\ud800 secret", "targets": "b"}', "lone_surrogate", "half of a surrogate pair"),
    (b"\x1f\x8b\x08\x00binary", "invalid_utf8", "byte 2 is not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_each_bad_line_is_named_and_nothing_is_left(
    tmp_path: Path, tokenizer_directory: Path, line: str | bytes, reason: str, message: str
) -> None:
    source = write(tmp_path / "r.jsonl", GOOD, "", line, GOOD)
    (tmp_path / "out").mkdir()
    with pytest.raises(RecordError) as caught:
        run([source], tokenizer_directory, tmp_path / "out" / "d")
    assert f"{source}:3 is not a record: " in str(caught.value) and message in str(caught.value)
    assert "secret" not in str(caught.value) and len(str(caught.value)) < 500  # never the whole content
    assert files_of(tmp_path / "out") == {}

    counts = run([source], tokenizer_directory, tmp_path / "out" / "d", on_bad_record="skip")["counts"]
    assert counts["malformed_reasons"] == {reason: 1}
    assert (counts["read"], counts["kept"], counts["malformed"], counts["blank_lines"]) == (3, 2, 1, 1)


def test_truncated_last_line_mark_and_valid_escapes(tmp_path: Path, tokenizer_directory: Path) -> None:
    source = tmp_path / "r.jsonl"
    source.write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + b'{"inputs": "\\ud83d\\ude00", "targets": "\\u0000b"}\n'
    )
    assert run([source], tokenizer_directory, tmp_path / "d")["counts"]["kept"] == 2
    source.write_bytes(GOOD.encode() + b"\n" + GOOD.encode()[:-9])
    with pytest.raises(RecordError, match="r.jsonl:2 is not a record"):
        run([source], tokenizer_directory, tmp_path / "e")


def test_a_bad_line_in_a_worker_is_the_first_one(tmp_path: Path, tokenizer_directory: Path) -> None:
    lines = many_records(6000)
    lines[3000] = lines[5900] = "{"
    source = write(tmp_path / "r.jsonl", *lines)
    with pytest.raises(RecordError, match=r"r\.jsonl:3001 is not a record"):
        run([source], tokenizer_directory, tmp_path / "out" / "d", workers=2)
    assert files_of(tmp_path / "out") == {}


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


def killed_at(step: int, source: Path, tokenizer: Path, prefix: Path, *, overwrite: bool) -> bool:
    """Preprocess in a forked child that kills itself before its `step`-th rename or removal; was it killed?"""
    child = os.fork()
    if child == 0:
        done = 0

        def count(function: object) -> object:
            def counted(*arguments: object, **options: object) -> object:
                nonlocal done
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return function(*arguments, **options)

            return counted

        os.replace, os.unlink, os.mkdir = count(os.replace), count(os.unlink), count(os.mkdir)
        run([source], tokenizer, prefix, overwrite=overwrite)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_nothing_half_written_opens(
    tmp_path: Path, tokenizer_directory: Path, overwrite: bool
) -> None:
    source = write(tmp_path / "r.jsonl", *many_records(10))
    old = write(tmp_path / "old.jsonl", GOOD)
    run([source], tokenizer_directory, tmp_path / "reference" / "d")
    reference = files_of(tmp_path / "reference")
    outcomes = set()
    for step in range(100):
        prefix = tmp_path / str(step) / "d"
        if overwrite:
            run([old], tokenizer_directory, prefix)
        if not killed_at(step, source, tokenizer_directory, prefix, overwrite=overwrite):
            break
        try:
            outcomes.add(len(ExampleDataset.open(prefix, deep=True)))  # the old one, or the whole new one
        except DatasetError:
            outcomes.add(0)
        finished = (prefix.parent / "d.json").exists()
        run([source], tokenizer_directory, prefix, overwrite=finished)  # simply run again
        assert files_of(prefix.parent) == reference
    assert step > 8, "the kill points were not reached"
    assert outcomes == ({0, 1, 8} if overwrite else {0, 8})


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

    source = write(tmp_path / "r.jsonl", *many_records(6000))
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


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=12),
    chunk_bytes=st.integers(1, 40),
    ended=st.booleans(),
)
def test_chunks_hold_every_line_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], chunk_bytes: int, ended: bool
) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.mktemp("chunks") / "f.jsonl"
    path.write_bytes(data)
    number = 1
    for chunk in read_chunks(path, chunk_bytes=chunk_bytes):
        assert chunk.first_line == number
        number += chunk.data.count(b"\n")
    joined = b"".join(chunk.data for chunk in read_chunks(path, chunk_bytes=chunk_bytes))
    assert joined == data.removeprefix(b"\xef\xbb\xbf")


def test_verbs(tmp_path: Path, tokenizer_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, prefix, tokenizer = write(tmp_path / "r.jsonl", GOOD, "{"), str(tmp_path / "d"), str(tokenizer_directory)
    command = ["preprocess", "--input", str(source), "--tokenizer", tokenizer, "--output-prefix", prefix]
    assert main(command) == 2
    assert f"RecordError: {source}:2 is not a record" in capsys.readouterr().err
    assert main([*command, "--on-bad-record", "skip"]) == 0
    assert "1 examples kept of 2 records" in capsys.readouterr().out
    assert main([*command, "--on-bad-record", "skip", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["malformed_reasons"] == {"invalid_json": 1}
    assert main(["merge", "--input", prefix, prefix, "--output-prefix", f"{prefix}2"]) == 0
    capsys.readouterr()
    assert main(["inspect", f"{prefix}2", "--show", "5", "--tokenizer", tokenizer, "--deep", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == 2 and report["unaltered"] is True
    assert [example["targets_text"] for example in report["examples"]] == [" twelve</s>"] * 2
    assert main(["inspect", f"{prefix}2.json", "--show", "1", "--tokenizer", tokenizer]) == 0
    shown = capsys.readouterr().out
    assert "twelve" in shown and "2 examples of kind pairs" in shown
    assert main(["inspect", str(tmp_path)]) == 2
    assert "directory of datasets" in capsys.readouterr().err


def test_inspect_checkpoint_and_packing_index(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run" / "checkpoints" / "step_0000000"
    shutil.copytree(tiny_checkpoint, copy)
    assert main(["inspect", str(tmp_path / "run"), "--deep", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["type"], report["step"], report["unaltered"]) == ("checkpoint", 0, True)
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "checkpoint of step 0" in capsys.readouterr().out
    shard = next(copy.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(tmp_path / "run"), "--deep"]) == 5
    assert shard.name in capsys.readouterr().err

    (tmp_path / "packing").mkdir()
    (tmp_path / "packing" / "packing.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "packing")]) == 2
    assert "is damaged" in capsys.readouterr().err
