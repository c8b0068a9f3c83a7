"""Fill a real, tiny file system under each writer; run by test_full_disk.py in a name space of its own.

    unshare --mount --map-root-user python -m tests.faults.full_disk_drill INPUTS.pickle DIRECTORY

For each subject: a tmpfs of a size that does not suffice, the verb, what it left; then the file system grows, and the
same verb again. Prints one JSON object, subject -> what was seen.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_xmtf.checkpoint import saver
from megatron_xmtf.checkpoint.directory import list_checkpoints, step_directory
from megatron_xmtf.checkpoint.manifest import open_manifest, verify_hashes
from megatron_xmtf.cli import main as xmtf
from megatron_xmtf.files import TEMPORARY_MARK
from megatron_xmtf.parallel.launch import prepare_to_fork
from megatron_xmtf.training.trainer import Trainer


def mount(directory: Path, size: str) -> None:
    """Mount a tmpfs, or give the one there another size."""
    how = "remount," if os.path.ismount(directory) else ""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(directory)], check=True)


def call(words: list[str], before: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run a verb in a forked process; return its exit code and what it said."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        code = 99
        try:
            before()
            code = xmtf(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
        said = stream.read()
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "said": said}


def files(directory: Path) -> dict[str, bytes]:
    """Return the finished files below a directory."""
    found = (path for path in directory.rglob("*") if path.is_file() and TEMPORARY_MARK not in str(path))
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def verb(words: Callable[[Path], list[str]], root: Path, size: str) -> dict[str, Any]:
    """Run a verb without enough space, with enough, and elsewhere."""
    small, large = root / "small", root / "large"
    mount(small, size)
    full = call(words(small))
    left = sorted(files(small))
    mount(small, "64m")
    again = call(words(small))
    mount(large, "64m")
    undisturbed = call(words(large))
    same = files(small) == files(large)
    for directory in (small, large):
        subprocess.run(["umount", str(directory)], check=True)
    return {"full": full, "left": left, "again": again, "undisturbed": undisturbed["code"], "same": same}


def train(
    config: Path, root: Path, *overrides: str, fill: Callable[[Path], Callable[[], None]], size: str
) -> dict[str, Any]:
    """Train two ranks without enough space, then with enough."""
    mount(root / "small", size)
    output = root / "small" / "run"
    words = ["train", str(config), "--nproc", "2", f"output={output}", *overrides]
    full = call(words, before=fill(root / "small"))
    checkpoints = output / "checkpoints"
    steps = [step for step, _ in list_checkpoints(checkpoints)] if checkpoints.exists() else []
    for step in steps:
        path = step_directory(checkpoints, step)
        verify_hashes(path, open_manifest(path))
    status = json.loads((output / "status.json").read_text()) if (output / "status.json").exists() else {}
    (root / "small" / "ballast").unlink(missing_ok=True)
    mount(root / "small", "256m")
    again = call(words)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {line["step"]: line["loss"] for line in map(json.loads, lines)}
    left = [path.name for path in (output / "checkpoints").iterdir() if TEMPORARY_MARK in path.name]
    subprocess.run(["umount", str(root / "small")], check=True)
    return {"full": full, "steps": steps, "status": status, "again": again, "losses": losses, "left": left}


def without_the_check_before(root: Path) -> Callable[[], None]:
    """Let a save begin that does not fit: the check of the space before it sees the file system of another moment."""

    def prepare() -> None:
        assert saver.SPARE_BYTES > 0
        saver.SPARE_BYTES = -(1 << 40)

    return prepare


def filled_at_step_three(root: Path) -> Callable[[], None]:
    """Leave no page free once two steps are done; metrics.jsonl grows until it needs one."""

    def prepare() -> None:
        saver.SPARE_BYTES = -(1 << 40)
        plain = Trainer.train_step

        def filling(self: Trainer) -> dict[str, Any]:
            if self.step == 3 and self.topology.rank == 0:
                with open(root / "ballast", "wb", buffering=0) as stream:
                    try:
                        while stream.write(bytes(1 << 16)):
                            pass
                    except OSError:
                        os.truncate(root / "ballast", (root / "ballast").stat().st_size // 4096 * 4096)
            return {**plain(self), "padding": "x" * 5000}

        Trainer.train_step = filling  # type: ignore[method-assign]

    return prepare


def main() -> None:
    """Run all subjects."""
    prepare_to_fork()
    inputs = pickle.loads(Path(sys.argv[1]).read_bytes())
    root = Path(sys.argv[2])

    def preprocess(at: Path) -> list[str]:
        return ["preprocess", "--input", inputs["records"], "--tokenizer", inputs["hf"], "--output-prefix", f"{at}/d"]

    def pack(at: Path) -> list[str]:
        return ["pack", inputs["config"], f"data.index_directory={at}/packing"]

    def export(at: Path) -> list[str]:
        return ["export", "--checkpoint", inputs["checkpoint"], "--output", f"{at}/hf"]

    config = Path(inputs["config"])
    found = {
        "preprocess": verb(preprocess, root, "64k"),
        "pack": verb(pack, root, "8k"),
        "export": verb(export, root, "512k"),
        "save, checked before": train(config, root, fill=lambda at: lambda: None, size="40m"),
        "save": train(config, root, fill=without_the_check_before, size="8m"),
        # Nothing is written beside the training: the first write after the disk is full is that of a line.
        "metrics.jsonl": train(
            config,
            root,
            "checkpoint.async_save=false",
            "checkpoint.save_interval=2",
            fill=filled_at_step_three,
            size="24m",
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
