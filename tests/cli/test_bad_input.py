"""What a user gets wrong ends in one message, the documented exit code, and nothing new on the disk."""

import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xmtf.cli import main
from megatron_xmtf.config import load_config
from megatron_xmtf.files import sha256_file
from megatron_xmtf.training.prepare import prepare_run
from tests.tiny import write_tiny_tokenizer

GOOD = b'{"inputs": "a", "targets": "b"}\n'
USER, MISMATCH, CORRUPT, NON_FINITE = 2, 4, 5, 7


def listing(directory: Path) -> dict[str, int]:
    """Return every path below `directory` with its size."""
    return {str(path.relative_to(directory)): path.lstat().st_size for path in directory.rglob("*")}


def refused(code: int, verb: str, *words: Any, below: Path) -> str:
    """Call the command, check how it refuses, and return the message.

    Args:    code: the exit code that is due. below: the directory where nothing may change, `status.json` apart.
    """
    before, out, err = listing(below), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = main([verb, *map(str, words)])
    text = err.getvalue()
    assert got == code, text
    assert "Traceback" not in text
    message = text.strip().splitlines()[-1] if verb != "render" else text.strip()
    assert message.startswith(f"xmtf {verb}: "), text
    assert text.count(f"xmtf {verb}: ") == 1, text
    assert out.getvalue() == ""
    after = listing(below)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.endswith("status.json")} == set()
    return message


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with its configuration file beside it: DIR/train.yaml, DIR/run."""
    directory = tmp_path_factory.mktemp("trained")
    values = {
        "model": str(tiny_checkpoint),
        "output": str(directory / "run"),
        "data": {"train": [{"prefix": str(tiny_pairs)}]},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8, "sequence_length": 64},
        "schedule": {"train_steps": 2},
        "optimizer": {"lr": 1e-3},
        "precision": "fp32",
    }
    (directory / "train.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", str(directory / "train.yaml")]) == 0
    return directory


@pytest.fixture
def refuse_train(trained: Path, tmp_path: Path) -> Callable[..., str]:
    """`refused` for a fresh run of the trained one's configuration."""

    def refuse(*words: Any, code: int = USER, output: Path = tmp_path / "run", below: Path = tmp_path) -> str:
        return refused(code, "train", trained / "train.yaml", f"output={output}", *words, below=below)

    return refuse


# -- records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"inputs": "a", \n', ["not JSON", ":2 "]),
        (b'{"inputs": "a"}\n', ["there is no field 'targets'", ":2 "]),
        (b'{"inputs": "\xff", "targets": "b"}\n', ["not UTF-8", ":2 "]),
        (b"[1]\n", ["a list, not an object"]),
        (b'{"inputs": "a", "targets": 3}\n', ["'targets' is a number"]),
        (b'{"inputs":' + b"[" * 100_000 + b"\n", ["nested too deeply"]),
    ],
    ids=["malformed", "missing-field", "utf8", "list", "number", "deep"],
)
def test_a_bad_record_stops_preprocessing(line: bytes, words: list[str], tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(GOOD + line)
    options = ["--input", tmp_path / "bad.jsonl", "--tokenizer", tiny_hf, "--output-prefix", tmp_path / "out"]
    message = refused(USER, "preprocess", *options, below=tmp_path)
    assert "RecordError" in message
    assert "bad.jsonl:2" in message
    assert "--on-bad-record skip" in message
    assert all(word in message for word in words)


def test_worker_processes_hand_their_error_on(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"{\n")
    options = ["--input", tmp_path / "bad.jsonl", "--tokenizer", tiny_hf, "--output-prefix", tmp_path / "out"]
    assert "bad.jsonl:2" in refused(USER, "preprocess", *options, "--workers", 2, below=tmp_path)


def test_bad_records_and_empty_targets_are_counted_when_skipped(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = b'{"inputs": "a", \n' + b'{"inputs": "\xff", "targets": "b"}\n'
    (tmp_path / "bad.jsonl").write_bytes(GOOD + bad + b'{"inputs": "a", "targets": ""}\n' + GOOD)
    options = ["--input", tmp_path / "bad.jsonl", "--tokenizer", tiny_hf, "--output-prefix", tmp_path / "out"]
    assert main(["preprocess", *map(str, options), "--on-bad-record", "skip", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert (counts["read"], counts["kept"], counts["empty_targets"], counts["malformed"]) == (5, 2, 1, 2)


def test_records_that_are_all_empty_leave_no_dataset(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b'{"inputs": "a", "targets": ""}\n')
    options = ["--input", tmp_path / "empty.jsonl", "--tokenizer", tiny_hf, "--output-prefix", tmp_path / "out"]
    assert "empty targets: 1" in refused(USER, "preprocess", *options, below=tmp_path)


def test_paths_that_cannot_be_are_named(tiny_hf: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")

    def preprocess(input: Path, tokenizer: Path, prefix: Path) -> str:
        words = ["--input", input, "--tokenizer", tokenizer, "--output-prefix", prefix]
        return refused(USER, "preprocess", *words, below=tmp_path)

    good, out = tmp_path / "good.jsonl", tmp_path / "out"
    assert "does not exist" in preprocess(tmp_path / "absent.jsonl", tiny_hf, out)
    assert "is a directory" in preprocess(tmp_path / "empty", tiny_hf, out)
    assert "truncated gzip" in preprocess(tmp_path / "broken.jsonl.gz", tiny_hf, out)
    assert "holds no tokenizer" in preprocess(good, tmp_path / "empty", out)
    assert "is not a directory" in preprocess(good, tmp_path / "absent", out)
    assert "--overwrite" in preprocess(good, tiny_hf, tiny_pairs)
    assert str(good) in preprocess(good, tiny_hf, good / "below_a_file")


# -- datasets -----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("mutate", "word"),
    [
        (lambda d: cut(d / "tiny_targets_document.bin"), "tiny_targets_document.bin is "),
        (lambda d: cut(d / "tiny_inputs_document.idx"), "tiny_inputs_document.idx is "),
        (lambda d: (d / "tiny_targets_document.idx").unlink(), "tiny_targets_document.idx is missing"),
        (lambda d: (d / "tiny_inputs_document.bin").unlink(), "tiny_inputs_document.bin is missing"),
        (lambda d: (d / "tiny.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "tiny.json").write_text("{}"), "is not the manifest"),
    ],
    ids=["bin-cut", "idx-cut", "idx-missing", "half-missing", "manifest-broken", "manifest-empty"],
)
def test_a_damaged_dataset_is_refused_before_training(
    mutate: Callable[[Path], Any], word: str, tiny_pairs: Path, tmp_path: Path, refuse_train: Callable[..., str]
) -> None:
    for path in tiny_pairs.parent.glob("tiny[_.]*"):
        shutil.copy(path, tmp_path / path.name)
    mutate(tmp_path)
    message = refuse_train(f"data.train.0.prefix={tmp_path / 'tiny'}")
    assert "DatasetError" in message
    assert word in message


def test_data_of_another_tokenizer_of_the_same_size_is_refused(
    tiny_pairs: Path, tmp_path: Path, refuse_train: Callable[..., str]
) -> None:
    write_tiny_tokenizer(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    words = value["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(value), encoding="utf-8")
    options = ["--input", tiny_pairs.parent / "tiny.jsonl", "--tokenizer", tmp_path / "other"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["preprocess", *map(str, options), "--output-prefix", str(tmp_path / "swapped")]) == 0
    message = refuse_train(f"data.train.0.prefix={tmp_path / 'swapped'}")
    assert "TokenizerError" in message
    assert message.count("(260 ids)") == 2
    merged = ["--input", tiny_pairs, tmp_path / "swapped", "--output-prefix", tmp_path / "merged"]
    assert "tokenizer differs" in refused(USER, "merge", *merged, below=tmp_path)


@pytest.mark.parametrize("policy", ["drop", "truncate_inputs_left", "truncate_inputs_right"])
def test_over_long_examples_are_counted(policy: str, tiny_pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pack", "--data", str(tiny_pairs), "--sequence-length", "16", "--long-examples", policy, "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    manifest = json.loads(tiny_pairs.with_suffix(".json").read_text(encoding="utf-8"))
    assert report["dropped" if policy == "drop" else "truncated"] > 50
    assert report["truncated" if policy == "drop" else "dropped"] == 0
    assert report["examples"] + report["dropped"] == manifest["counts"]["kept"] == 400


def test_an_over_long_example_is_an_error_when_asked_for(refuse_train: Callable[..., str]) -> None:
    message = refuse_train("data.long_examples=error", "batch.sequence_length=16")
    assert "a row holds 17" in message
    assert "Raise sequence_length, or set long_examples" in message


# -- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nproc", 0], ["nproc=0", "at least one rank"]),
        (["--nproc", -1], ["nproc=-1"]),
        (["--nproc", 2, "parallel.tensor_model_parallel_size=3"], ["2 ranks", "multiple of 3", "start 3 ranks"]),
        (["--nproc", 3, "parallel.tensor_model_parallel_size=3"], ["4 attention heads", "[1, 2, 4]"]),
        (["--nproc", 3, "parallel.pipeline_model_parallel_size=3"], ["4 layers", "[1, 2, 4]"]),
        (["batch.global_batch_size=7"], ["global_batch_size=7", "use 6 or 8"]),
        (["--nproc", 2, "batch.global_batch_size=6"], ["2 x 2", "use 4 or 8"]),
        (["batch.micro_batchsize=1"], ["unknown key 'batch.micro_batchsize'", "nearest: micro_batch_size"]),
        (["optimizer.lr=fast"], ["optimizer.lr='fast'", "valid number"]),
        (["optimizer.lr=.inf"], ["optimizer.lr=inf", "finite"]),
        (["batch.micro_batch_size=two"], ["batch.micro_batch_size='two'", "valid integer"]),
        (["parallel=3"], ["parallel=3", "a section of keys"]),
        (["checkpoint.resume=latst"], ["checkpoint.resume='latst'", "'latest'"]),
        (["optimizer.lr"], ["'optimizer.lr'", "key=value"]),
        (["seed=[1"], ["seed=[1", "YAML"]),
        (["seed.deep.er=1"], ["seed"]),
        (["data.train.5.prefix=x"], ["'5' is not an index"]),
        (["checkpoint.resume=3"], ["step 3", "there are: none"]),
        (["kernels.attention=sdpa", "precision=bf16"], ["kernels.attention=sdpa", "precision=fp32"]),
        (["schedule.train_rows=16"], ["schedule.train_steps", "exactly one"]),
        (["parallel.sequence_parallel=true"], ["tensor_model_parallel_size > 1"]),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else None,
)
def test_a_configuration_that_cannot_run(
    words: list[Any], expected: list[str], refuse_train: Callable[..., str]
) -> None:
    message = refuse_train(*words)
    for part in expected:
        assert part in message


def test_sizes_are_checked_before_a_model_is_imported(
    tiny_hf: Path, tmp_path: Path, refuse_train: Callable[..., str]
) -> None:
    sizes = ["--nproc", 3, "parallel.tensor_model_parallel_size=3"]
    assert "4 attention heads" in refuse_train(f"model={tiny_hf}", *sizes)
    assert "no dataset at" in refuse_train(f"model={tiny_hf}", f"data.train.0.prefix={tmp_path / 'absent'}")


def test_another_model_is_not_taken_for_the_one_imported_before(tiny_hf: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_hf, tmp_path / "other")
    for model in (tiny_hf, tmp_path / "other", tiny_hf):
        prepare_run(load_config(trained / "train.yaml", [f"output={tmp_path / 'run'}", f"model={model}"]), world_size=1)
    assert len(list((tmp_path / "run" / "imported").iterdir())) == 2


def test_missing_models_and_data(tmp_path: Path, trained: Path, refuse_train: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refuse_train(f"model={tmp_path / 'absent'}")
    assert "is a file" in refuse_train(f"model={trained / 'train.yaml'}")
    assert "neither a checkpoint" in refuse_train(f"model={tmp_path / 'empty'}")
    assert "no dataset at" in refuse_train(f"data.train.0.prefix={tmp_path / 'absent'}")
    assert "does not exist" in refused(USER, "train", tmp_path / "absent.yaml", below=tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model: !!python/object/apply:os.system [ls]", ":1:8"),
        ("model: !mine x", "!mine"),
        ("a: &x 1\nb: *x", "aliases"),
        ("seed: 1\nseed: 2", "appears twice"),
        ("{[1]: 2}", "no plain word"),
        ("a: [1", ":1:6"),
        ("- 1", "holds a list"),
        ("", "is empty"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
    ids=["python-tag", "tag", "alias", "duplicate", "list-key", "broken", "list", "empty", "deep"],
)
def test_yaml_that_is_not_plain(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    message = refused(USER, "train", tmp_path / "bad.yaml", below=tmp_path)
    assert "bad.yaml" in message
    assert word in message


# -- checkpoints --------------------------------------------------------------------------------------------------


class Crafted:
    """Pickled, it makes a file where it is read carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def step(trained: Path, tmp_path: Path) -> Path:
    """The trained run's last checkpoint, in a copy of the run."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_0000002"


def readers(step: Path, hf: Path) -> list[list[Any]]:
    """Every command that reads a checkpoint."""
    return [
        ["export", "--checkpoint", step, "--output", step.parents[2] / "exported"],
        ["generate", "--checkpoint", step, "--prompt", "a"],
        ["verify", "--checkpoint", step, "--hf", hf],
        ["inspect", step, "--deep"],
    ]


@pytest.mark.parametrize(
    ("mutate", "word"),
    [
        (lambda step: cut(step / "__0_0.distcp"), "__0_0.distcp has"),
        (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda step: shutil.rmtree(step / "hf"), "hf/config.json is missing"),
        (lambda step: (step / "manifest.json").write_text("{"), "manifest"),
    ],
    ids=["shard-cut", "shard-missing", "hf-missing", "manifest-broken"],
)
def test_a_checkpoint_that_is_not_whole(
    mutate: Callable[[Path], Any],
    word: str,
    step: Path,
    tiny_hf: Path,
    tmp_path: Path,
    refuse_train: Callable[..., str],
) -> None:
    mutate(step)
    for command in readers(step, tiny_hf):
        message = refused(CORRUPT, command[0], *command[1:], below=tmp_path)
        assert "CorruptCheckpointError" in message
        assert word in message
    assert word in refuse_train("schedule.train_steps=3", code=CORRUPT)
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["exit_code"], status["name"]) == (5, "CORRUPT_CHECKPOINT")


def test_an_altered_shard_is_found_by_a_deep_look(step: Path, tmp_path: Path) -> None:
    content = bytearray((step / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (step / "__0_0.distcp").write_bytes(content)
    assert "__0_0.distcp was altered" in refused(CORRUPT, "inspect", step, "--deep", below=tmp_path)


def test_crafted_metadata_is_refused_even_with_a_matching_manifest(
    step: Path, tiny_hf: Path, tmp_path: Path, refuse_train: Callable[..., str]
) -> None:
    mark = tmp_path / "was_run"
    (step / ".metadata").write_bytes(pickle.dumps(Crafted(mark)))
    manifest = json.loads((step / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest["files"][".metadata"]
    entry.update(bytes=(step / ".metadata").stat().st_size, sha256=sha256_file(step / ".metadata"))
    (step / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for command in readers(step, tiny_hf):
        assert "posix.mkdir" in refused(CORRUPT, command[0], *command[1:], below=tmp_path)
    assert not mark.exists()
    # Ranks read it when they start: the run directory's index for three steps exists by then.
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(
            ["train", str(tmp_path / "run" / "config.yaml"), "schedule.train_steps=3", f"output={tmp_path}/run"]
        )
    assert code == CORRUPT
    assert "posix.mkdir" in err.getvalue()
    assert not mark.exists()


def test_a_step_without_manifest_is_no_reason_to_start_over(step: Path, refuse_train: Callable[..., str]) -> None:
    (step / "manifest.json").unlink()
    message = refuse_train("schedule.train_steps=3", code=CORRUPT)
    assert "step_0000002 has no manifest.json" in message
    assert "silently start again from step 0" in message


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["optimizer.lr=2e-3"], MISMATCH, ["optimizer.lr: 0.001 -> 0.002", "--allow-change optimizer.lr"]),
        (["checkpoint.resume=9"], USER, ["step 9", "there are: 2"]),
        (["checkpoint.resume=none"], USER, ["would start over", "checkpoint.resume=latest"]),
    ],
    ids=["changed", "absent-step", "start-over"],
)
def test_a_run_that_cannot_be_resumed_so(
    words: list[str], code: int, expected: list[str], step: Path, refuse_train: Callable[..., str]
) -> None:
    message = refuse_train(*words, code=code)
    for part in expected:
        assert part in message


# -- models -------------------------------------------------------------------------------------------------------


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return change


def put_infinity(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def put_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Crafted(directory / "was_run")))


@pytest.mark.parametrize(
    ("mutate", "code", "word"),
    [
        (edit(model_type="gpt2"), USER, "model_type 'gpt2' has no family here; known: blenderbot, bloom"),
        (edit(auto_map={"AutoModel": "evil.Model"}), USER, "names code to run"),
        (edit(n_head=3), USER, "hidden_size=64 is not a multiple of n_head=3"),
        (edit(n_layer=9), USER, "missing (60)"),
        (lambda d: (d / "config.json").write_text("{"), USER, "not valid JSON"),
        (lambda d: (d / "config.json").unlink(), USER, "config.json does not exist"),
        (lambda d: (d / "model.safetensors").unlink(), USER, "holds no weights"),
        (lambda d: cut(d / "model.safetensors"), CORRUPT, "not a whole safetensors file"),
        (put_pickle, CORRUPT, "is refused: it names"),
        (put_infinity, NON_FINITE, "NaN or Inf"),
    ],
    ids="gpt2 auto_map heads layers config-broken no-config no-weights cut pickle infinity".split(),
)
def test_a_model_that_cannot_be_imported(
    mutate: Callable[[Path], Any], code: int, word: str, tiny_hf: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_hf, tmp_path / "hf")
    mutate(tmp_path / "hf")
    assert word in refused(code, "import", "--hf", tmp_path / "hf", "--output", tmp_path / "out", below=tmp_path)


def test_an_output_that_exists_is_never_touched(tiny_hf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for words in (
        ["import", "--hf", tiny_hf, "--output", tmp_path / "out"],
        ["export", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out"],
    ):
        assert "exists already" in refused(USER, words[0], *words[1:], below=tmp_path)


# -- evaluation, generation, rendering ----------------------------------------------------------------------------


def test_models_that_cannot_be_asked(tiny_hf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def generate(*words: Any) -> str:
        return refused(USER, "generate", "--prompt", "a", *words, below=tmp_path)

    shutil.copytree(tiny_hf, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    shutil.copytree(tiny_hf, tmp_path / "pickled")
    put_pickle(tmp_path / "pickled")
    assert "name a model" in generate()
    assert "does not exist" in generate("--hf", tmp_path / "absent")
    assert "does not exist" in generate("--checkpoint", tmp_path / "absent")
    assert "xmtf import" in generate("--checkpoint", tiny_hf)
    assert "holds no tokenizer" in generate("--hf", tmp_path / "bare")
    assert "more than tensors" in generate("--hf", tmp_path / "pickled")
    assert "nproc=0" in generate("--checkpoint", tiny_checkpoint, "--nproc", 0)
    assert "4 attention heads" in generate("--checkpoint", tiny_checkpoint, "--tensor-model-parallel-size", 3)
    assert not (tmp_path / "pickled" / "was_run").exists()


@pytest.mark.parametrize(
    ("task", "word"),
    [
        ("{name: x, records: r.jsonl, choices: ['yes', 'no']}", "'maybe' is not among its choices ['yes', 'no']"),
        ("{name: x, records: r.jsonl, choices: [yes, no]}", "choices.0=True"),
        ("{name: x, records: absent.jsonl, choices: ['yes', 'no']}", "absent.jsonl does not exist"),
        ("{name: x, records: r.jsonl, metric: acuracy}", "metric='acuracy'"),
        ("{name: x, record: r.jsonl}", "nearest: records"),
        ("{name: x, records: b.jsonl, choices: ['yes', 'no']}", "b.jsonl:1:25"),
    ],
    ids="not-a-choice yaml-bool absent metric key malformed".split(),
)
def test_task_files_that_cannot_be_asked(task: str, word: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"inputs": "a", "targets": "maybe"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"inputs":"a","targets":\n', encoding="utf-8")
    (tmp_path / "tasks.yaml").write_text(f"- {task}\n", encoding="utf-8")
    words = ["--checkpoint", tiny_checkpoint, "--tasks", tmp_path / "tasks.yaml", "--output", tmp_path / "out"]
    assert word in refused(USER, "evaluate", *words, below=tmp_path)


@pytest.mark.parametrize(
    ("jinja", "word"),
    [
        ("{{ ().__class__.__mro__ }} ||| x", "out of bounds"),
        ("{% for i in range(1000000000) %}x{% endfor %} ||| y", "Range too big"),
        ("{{ text }}", "has no '|||'"),
        ("{{ text ||| x", "line 1"),
    ],
    ids="class range no-target syntax".split(),
)
def test_hostile_templates(jinja: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n', encoding="utf-8")
    template = (
        f"dataset: x\ntemplates:\n  a: !Template\n    name: n\n    id: a\n    jinja: {json.dumps(jinja)}\n"
        "    answer_choices: null\n    reference: ''\n    metadata: !TemplateMetadata\n      languages: [en]\n"
    )
    (tmp_path / "t.yaml").write_text(template, encoding="utf-8")
    words = ["--source", tmp_path / "rows.jsonl", "--templates", tmp_path / "t.yaml", "--output", tmp_path / "o.jsonl"]
    message = refused(USER, "render", *words, below=tmp_path)
    assert "TemplateError" in message
    assert word in message
