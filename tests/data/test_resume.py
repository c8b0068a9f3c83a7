"""A run that is killed at any moment, stopped, or out of space goes on with the same bytes, and says what it keeps."""

import gzip
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_xmtf.cli import main
from megatron_xmtf.data import line_chunks
from megatron_xmtf.data.example_dataset import ExampleDataset
from megatron_xmtf.data.example_writer import ExampleDatasetWriter
from megatron_xmtf.data.line_chunks import read_chunks
from megatron_xmtf.data.merge import merge_datasets
from megatron_xmtf.data.part_file import PartFile
from megatron_xmtf.data.preprocess import preprocess
from megatron_xmtf.data.records import LineChunk
from megatron_xmtf.errors import DatasetError, DiskFullError, RecordError

LANGUAGES = ["sw", "yo", "en"]


def records(start: int, stop: int) -> bytes:
    rows = (
        {
            "inputs": f"Je, {n} + {n}?",
            "targets": f"ni {2 * n} " * (n % 5),
            "language": LANGUAGES[n * n % 3],
            "id": n // 2,
        }
        for n in range(start, stop)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """A plain, a gzip and a zstd file: 60 records, the middle one with a malformed line at its end."""
    directory = tmp_path / "inputs"
    directory.mkdir()
    contents = {
        "a.jsonl": b"\xef\xbb\xbf" + records(0, 20),
        "b.jsonl.gz": gzip.compress(records(20, 30)) + gzip.compress(records(30, 40) + b"{\n"),
        "c.jsonl.zst": zstandard.compress(records(40, 50)) + zstandard.compress(records(50, 60).rstrip()),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in contents]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of some records, so that a small input has many of them."""
    monkeypatch.setitem(read_chunks.__kwdefaults__, "chunk_bytes", 1200)


def run(inputs: list[Path], tokenizer: Path, prefix: Path, **options: Any) -> dict:
    options = {"on_bad_record": "skip", "record_seconds": 0.0, "show_progress": False, **options}
    return preprocess(inputs, tokenizer=tokenizer, output_prefix=prefix, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def undisturbed(inputs: list[Path], tokenizer_directory: Path, tmp_path: Path) -> dict[str, bytes]:
    """Files of a run in one piece, with large chunks and without a journal."""
    run(inputs, tokenizer_directory, tmp_path / "undisturbed" / "d", record_seconds=1e9)
    return files_of(tmp_path / "undisturbed")


def in_child(action: Callable[[], object]) -> int:
    """Do something in a forked process; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            os._exit(getattr(error, "exit_code", 99))
    return os.waitpid(child, 0)[1]


def kill_at(step: int) -> None:
    """End this process with SIGKILL at its `step`-th call that changes the disk; half of a write is done before."""
    done = 0

    def is_due() -> bool:
        nonlocal done
        done += 1
        return done > step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if is_due():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def write(part: PartFile, data: bytes) -> None:
        if is_due():
            os.write(part._stream.fileno(), memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written(part, data)

    written = PartFile.write
    PartFile.write = write  # type: ignore[method-assign]
    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_step_it_goes_on_with_the_same_bytes(
    inputs: list[Path],
    tokenizer_directory: Path,
    undisturbed: dict[str, bytes],
    small_chunks: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overwrite: bool,
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_bytes(records(1, 2))
    stride = 3 if overwrite else 5  # no divisors of the steps of one record
    outcomes, resumed, step = set(), 0, 0
    while True:
        prefix = tmp_path / str(step) / "d"
        if overwrite:
            run([old], tokenizer_directory, prefix, record_seconds=1e9)

        def killed(prefix: Path = prefix, step: int = step) -> None:
            kill_at(step)
            run(inputs, tokenizer_directory, prefix, overwrite=overwrite)

        status = in_child(killed)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        try:
            outcomes.add(len(ExampleDataset.open(prefix, deep=True)))  # the old one, or the whole new one
        except DatasetError:
            outcomes.add(0)
        if step % 8 == 0:
            in_child(killed)  # killed a second time, later in the work
        caplog.clear()
        finished = (prefix.parent / "d.json").exists()
        with caplog.at_level(logging.WARNING):
            run(inputs, tokenizer_directory, prefix, overwrite=finished)
        resumed += "going on from an interrupted run" in caplog.text
        assert files_of(prefix.parent) == undisturbed, step
        shutil.rmtree(prefix.parent)
        step += stride
    assert step > 60 and resumed > 5, "the kill points were not reached, or nothing was taken over"
    assert outcomes == ({0, 1, 48} if overwrite else {0, 48})


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, signal.Signals], None]]:
    """Send this process a signal while it writes its n-th chunk."""
    add = ExampleDatasetWriter.add

    def arrange(chunks: int, number: signal.Signals) -> None:
        left = chunks

        def add_and_stop(*arguments: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            add(*arguments, **options)

        monkeypatch.setattr(ExampleDatasetWriter, "add", add_and_stop)

    yield arrange


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_its_work(
    inputs: list[Path],
    tokenizer_directory: Path,
    undisturbed: dict[str, bytes],
    small_chunks: None,
    stop_after: Callable[[int, signal.Signals], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    prefix = tmp_path / "out" / "d"
    command = ["preprocess", "--input", *map(str, inputs), "--tokenizer", str(tokenizer_directory)]
    command += ["--output-prefix", str(prefix), "--on-bad-record", "skip"]
    stop_after(4, number)
    assert main(command) == 3
    error = capsys.readouterr().err
    assert f"stopped by {number.name}. The work on the first" in error and "the same command goes on" in error
    assert [path.name[:6] for path in prefix.parent.iterdir()] == ["d.tmp-"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(DatasetError, match="interrupted"):
        ExampleDataset.open(prefix)
    stop_after(3, number)
    assert main([*command, "--workers", "2"]) == 3
    stop_after(10**6, number)
    assert main(command) == 0
    assert files_of(prefix.parent) == undisturbed


def test_stopped_before_the_first_chunk(
    inputs: list[Path], tokenizer_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(paths: Any, *, start: Any, on_block: Callable[[], None]) -> Iterator[LineChunk]:
        for _ in range(2):  # as `timeout` sends them
            os.kill(os.getpid(), signal.SIGTERM)
        return line_chunks.read_files(paths, start=start, on_block=on_block)

    monkeypatch.setattr("megatron_xmtf.data.preprocess.read_files", stop)
    command = ["preprocess", "--input", str(inputs[0]), "--tokenizer", str(tokenizer_directory), "--output-prefix"]
    assert main([*command, str(tmp_path / "out" / "d")]) == 1
    assert "stopped by SIGTERM. Nothing was written." in capsys.readouterr().err
    assert files_of(tmp_path / "out") == {}


def test_another_run_is_refused_until_restart(
    inputs: list[Path],
    tokenizer_directory: Path,
    undisturbed: dict[str, bytes],
    small_chunks: None,
    tmp_path: Path,
) -> None:
    from tests.data.conftest import make_tokenizer

    prefix = tmp_path / "out" / "d"

    def half() -> None:
        kill_at(60)
        run(inputs, tokenizer_directory, prefix)

    assert os.WIFSIGNALED(in_child(half))
    kept = {path: path.read_bytes() for path in prefix.parent.rglob("*") if path.is_file()}
    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    for options, message in (
        ({"target_prefix": ""}, "target prefix was ' ', is ''"),
        ({"field_map": {"language": "lang"}}, "field map was"),
        ({"tokenizer": other}, "tokenizer was"),
        ({"inputs": inputs[:2]}, "3 input files then, 2 now"),
        (
            {"inputs": [inputs[0], inputs[2], inputs[1]]},
            r"c\.jsonl\.zst is not the file that was read then as .*b\.jsonl",
        ),
    ):
        arguments: dict[str, Any] = {"inputs": inputs, "tokenizer": tokenizer_directory, **options}
        with pytest.raises(DatasetError, match=f"this run is another: .*{message}.*--restart"):
            run(arguments.pop("inputs"), arguments.pop("tokenizer"), prefix, **arguments)
    complete = tmp_path / "undisturbed" / "d"
    with pytest.raises(DatasetError, match="it is of another command.*remove that directory"):
        merge_datasets([complete], output_prefix=prefix, show_progress=False)
    assert {path: path.read_bytes() for path in prefix.parent.rglob("*") if path.is_file()} == kept

    copies = [path.rename(path.with_name(f"moved-{path.name}")) for path in inputs]  # the same files at other places
    assert run(copies, tokenizer_directory, prefix)["num_examples"] == 48
    for copy, path in zip(copies, inputs, strict=True):
        copy.rename(path)
    shutil.rmtree(prefix.parent)
    assert os.WIFSIGNALED(in_child(half))
    run(inputs, tokenizer_directory, prefix, restart=True)
    assert files_of(prefix.parent) == undisturbed


def test_damaged_parts_and_journals_are_refused(
    inputs: list[Path], tokenizer_directory: Path, small_chunks: None, tmp_path: Path
) -> None:
    def half(prefix: Path) -> None:
        kill_at(60)
        run(inputs, tokenizer_directory, prefix)

    def flip(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])

    damages: list[tuple[str, Callable[[Path], None], str]] = [
        ("inputs_document.bin.tmp-part", flip, "does not hold the"),
        ("columns.tmp-part", lambda path: os.truncate(path, 36), "does not hold the"),
        ("targets_document.lengths.tmp-part", Path.unlink, "No such file"),
        ("journal.json", lambda path: path.write_text("{}"), "cannot be gone on from"),
        ("journal.json", lambda path: path.write_text("[3"), "cannot be gone on from"),
    ]
    for number, (name, damage, message) in enumerate(damages):
        prefix = tmp_path / str(number) / "d"
        assert os.WIFSIGNALED(in_child(lambda prefix=prefix: half(prefix)))  # type: ignore[misc]
        (directory,) = prefix.parent.iterdir()
        damage(directory / name)
        with pytest.raises((DatasetError, OSError), match=message):
            run(inputs, tokenizer_directory, prefix)
        assert run(inputs, tokenizer_directory, prefix, restart=True)["num_examples"] == 48


def test_a_bad_line_late_in_a_long_run(
    inputs: list[Path], tokenizer_directory: Path, undisturbed: dict[str, bytes], small_chunks: None, tmp_path: Path
) -> None:
    """What was done is kept; the choice to skip bad lines goes on from there, the choice to stop does not."""
    prefix = tmp_path / "out" / "d"
    with pytest.raises(RecordError, match=r"b\.jsonl\.gz:21 is not a record.* is kept in .*--restart begins anew"):
        run(inputs, tokenizer_directory, prefix, on_bad_record="error")

    def later() -> None:
        kill_at(50)
        run(inputs, tokenizer_directory, prefix)

    assert os.WIFSIGNALED(in_child(later))
    with pytest.raises(DatasetError, match="left out 1 malformed lines.*--on-bad-record skip again"):
        run(inputs, tokenizer_directory, prefix, on_bad_record="error")
    run(inputs, tokenizer_directory, prefix)
    assert files_of(prefix.parent) == undisturbed


def test_full_disk_keeps_the_work(tokenizer_directory: Path, small_chunks: None, tmp_path: Path) -> None:
    """A real limit of the operating system, met in the middle of a write."""
    source, prefix = tmp_path / "r.jsonl", tmp_path / "out" / "d"
    source.write_bytes(records(0, 400))

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        try:
            run([source], tokenizer_directory, prefix)
        except DiskFullError as error:
            assert "ulimit -f" in str(error) and "is kept in" in str(error)
            raise

    assert os.WEXITSTATUS(in_child(limited)) == 8
    assert [path.name[:6] for path in prefix.parent.iterdir()] == ["d.tmp-"]
    run([source], tokenizer_directory, prefix)
    run([source], tokenizer_directory, tmp_path / "undisturbed" / "d")
    assert files_of(prefix.parent) == files_of(tmp_path / "undisturbed")


def test_an_input_that_changes_meanwhile(
    inputs: list[Path], tokenizer_directory: Path, small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ExampleDatasetWriter.add

    def add_and_append(*arguments: Any, **options: Any) -> None:
        add(*arguments, **options)
        os.utime(inputs[0], ns=(0, 0))

    monkeypatch.setattr(ExampleDatasetWriter, "add", add_and_append)
    with pytest.raises(RecordError, match=r"a\.jsonl changed while this run read it; nothing was written"):
        run(inputs[:1], tokenizer_directory, tmp_path / "out" / "d")
    assert files_of(tmp_path / "out") == {}


@pytest.mark.slow
def test_random_kills(tokenizer_directory: Path, tmp_path: Path) -> None:
    """20 times: kill -9 the run up to four times at random moments, with 1 or 2 workers in turn, then let it end."""
    random_moments = random.Random(os.environ.get("XMTF_DRILL_SEED", "0"))
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst"]
    for number, source in enumerate(sources):
        content = records(number * 150_000, (number + 1) * 150_000)
        pack: Callable[[bytes], bytes] = {".gz": gzip.compress, ".zst": zstandard.compress}.get(source.suffix, bytes)
        source.write_bytes(pack(content))
    run(sources, tokenizer_directory, tmp_path / "undisturbed" / "d", record_seconds=1e9)
    undisturbed = files_of(tmp_path / "undisturbed")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom megatron_xmtf.data.preprocess import preprocess\n"
        "if __name__ == '__main__':\n"
        f"    preprocess({list(map(str, sources))}, tokenizer={str(tokenizer_directory)!r},\n"
        "        output_prefix=sys.argv[1], workers=int(sys.argv[2]), on_bad_record='skip', record_seconds=0.2,\n"
        "        show_progress=False)\n"
    )
    for drill in range(20):
        prefix = tmp_path / str(drill) / "d"
        story = []
        while not (prefix.parent / "d.json").exists():
            workers = random_moments.choice([1, 2])
            process = subprocess.Popen(
                [sys.executable, str(program), str(prefix), str(workers)], stderr=subprocess.PIPE, text=True
            )
            moment = random_moments.uniform(0.5, 12.0)
            if len(story) < 4:
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.kill()
            errors = process.communicate()[1]
            going_on = "went on" if "going on from" in errors else "began"
            story.append(f"{going_on} with {workers}, {'ended' if process.returncode == 0 else f'{moment:.1f} s'}")
            assert process.returncode in (0, -signal.SIGKILL), errors
        print(f"drill {drill}: {'; '.join(story)}")
        for leftover in prefix.parent.glob("d.tmp-*"):  # killed between the last rename and the end
            shutil.rmtree(leftover)
        assert files_of(prefix.parent) == undisturbed
        shutil.rmtree(prefix.parent)


def test_going_on_does_not_read_again(
    inputs: list[Path], tokenizer_directory: Path, small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "out" / "d"

    def most() -> None:
        kill_at(120)
        run(inputs, tokenizer_directory, prefix)

    assert os.WIFSIGNALED(in_child(most))
    (directory,) = prefix.parent.iterdir()
    progress = json.loads((directory / "journal.json").read_text())["progress"]
    read = []
    monkeypatch.setattr(
        "megatron_xmtf.data.preprocess.read_files",
        lambda paths, start, **_: [read.append(c) or c for c in line_chunks.read_files(paths, start=start)],
    )
    run(inputs, tokenizer_directory, prefix)
    lines = sum(len(chunk.data.splitlines()) for chunk in read)
    assert 0 < progress["counts"]["read"] == 61 - lines
