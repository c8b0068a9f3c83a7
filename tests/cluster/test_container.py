"""Commands in containers: the words by apptainer-exec(1) and pyxis' `srun --help`; no container is started here.

What becomes of a mount of pyxis' is seen with the two that read it after pyxis: bash and the C library's getmntent.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_xmtf.cluster.checks import Finding, check_container
from megatron_xmtf.cluster.render import render_commands, render_train
from megatron_xmtf.config import config_from_mapping
from megatron_xmtf.config.slurm import SlurmConfig
from megatron_xmtf.errors import ConfigError
from tests.cluster.test_render import TrainingRun, run_script


def slurm(container: dict[str, Any], **values: Any) -> SlurmConfig:
    return config_from_mapping({"container": container, **values}, SlurmConfig, source="test")


def words_of_srun(text: str, directory: Path) -> list[str]:
    run_script(text, directory)
    return (directory / "words").read_text().split("\0")[:-1]


def test_apptainer_is_told_image_mounts_directory_and_variables(tmp_path: Path) -> None:
    where = tmp_path / "it's here"
    where.mkdir()
    container = {"image": "/images/it's $(x).sif", "mounts": ["/a b", "/data:/data:ro"]}
    settings = slurm(container, environment={"NCCL_IB_HCA": "mlx5", "A": "$(touch broken)"})
    text = render_commands([["export", "--output", "-x y"]], slurm=settings, job_name="j", working_directory=where)
    words = words_of_srun(text, tmp_path)
    assert words[words.index("apptainer") :] == [
        *("apptainer", "exec", "--nv", "--pwd", str(where), "--bind", "/a b", "--bind", "/data:/data:ro"),
        *("/images/it's $(x).sif", "env", "A=$(touch broken)", "NCCL_IB_HCA=mlx5"),
        *("python", "-m", "megatron_xmtf", "export", "--output", "-x y"),
    ]
    assert not list(tmp_path.rglob("broken"))


def test_pyxis_is_told_in_options_of_srun(tmp_path: Path) -> None:
    container = {"image": "nvcr.io#nvidia/pytorch:25.04-py3", "runtime": "pyxis", "mounts": ["/a b", "/d:/d:ro+nosuid"]}
    settings = slurm(container, python="/opt/venv/bin/python", environment={"X": "1"})
    text = render_commands([["export"]], slurm=settings, job_name="j", working_directory=tmp_path)
    words = words_of_srun(text, tmp_path)
    assert words[-9:] == [
        "--container-image=nvcr.io#nvidia/pytorch:25.04-py3",
        "--container-mounts=/a\\040b,/d:/d:ro+nosuid",
        f"--container-workdir={tmp_path}",
        *("env", "X=1", "/opt/venv/bin/python", "-m", "megatron_xmtf", "export"),
    ]
    run = TrainingRun(tmp_path / "c.yaml", tmp_path)
    text = render_train([run], slurm=settings, job_name="j", working_directory=tmp_path, submission="s")
    (once,) = [line for line in text.splitlines() if line.startswith("once=(")]
    assert once.startswith("once=(srun --nodes=1 --ntasks=1 ") and "--container-workdir=" in once


def test_caches_on_the_node_are_seen_inside(tmp_path: Path) -> None:
    for runtime, mounted in (("apptainer", "--bind '/scratch/my cache'"), ("pyxis", "mounts=/scratch/my\\040cache'")):
        settings = slurm({"image": "/i", "runtime": runtime}, node_local_directory="/scratch/my cache")
        text = render_commands([["export"]], slurm=settings, job_name="j", working_directory=tmp_path)
        assert mounted in text


class Entry(ctypes.Structure):
    """struct mntent of mntent.h."""

    _fields_ = [(name, ctypes.c_char_p) for name in ("fsname", "dir", "type", "opts")]


@pytest.mark.parametrize("name", ["/plain", "/a b", "/it's  two", "/é;|&*?~(x)#"])
def test_a_mount_of_pyxis_arrives_as_it_was_named(name: str, tmp_path: Path) -> None:
    settings = slurm({"image": "/i", "runtime": "pyxis", "mounts": [name]})
    words = words_of_srun(
        render_commands([["export"]], slurm=settings, job_name="j", working_directory=tmp_path), tmp_path
    )
    (option,) = [word for word in words if word.startswith("--container-mounts=")]
    mount = option.removeprefix("--container-mounts=")
    # pyxis: echo "SOURCE TARGET OPTIONS" in a script that enroot runs, whose lines getmntent reads.
    script = f'echo "{mount} {mount} x-create=auto,rbind"\n'
    (tmp_path / "fstab").write_text(subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout)
    libc = ctypes.CDLL(None)
    libc.setmntent.restype, libc.getmntent.restype = ctypes.c_void_p, ctypes.POINTER(Entry)
    stream = ctypes.c_void_p(libc.setmntent(str(tmp_path / "fstab").encode(), b"r"))
    entry = libc.getmntent(stream).contents
    found = (entry.fsname.decode(), entry.dir.decode())
    libc.endmntent(stream)
    assert found == (name, name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": "-x.sif"}, "image"),
        ({"image": "/i", "mounts": ["data"]}, "mounts"),
        ({"image": "/i", "mounts": ["/a,b"]}, "it reads , itself"),
        ({"image": "/i", "runtime": "pyxis", "mounts": ["/$(touch broken)"]}, r"it reads \$ itself"),
        ({"image": "/i", "runtime": "pyxis", "mounts": ["/`x`"]}, "it reads ` itself"),
        ({"image": "/i", "runtime": "pyxis", "mounts": ['/a"b']}, 'it reads " itself'),
        ({"image": "/i", "runtime": "pyxis", "mounts": ["/a\\b"]}, "itself"),
    ],
)
def test_what_the_tool_would_misread_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slurm(values)


def test_an_interpreter_is_no_option_and_a_cache_no_second_mount() -> None:
    with pytest.raises(ConfigError, match="python"):
        slurm({"image": "/i"}, python="-m")
    with pytest.raises(ConfigError, match="it reads : itself"):
        slurm({"image": "/i"}, node_local_directory="/a:b")


def found(container: dict[str, Any], *paths: Path, where: Path) -> list[Finding]:
    return check_container(slurm(container), paths, working_directory=where)


def test_image_and_mounts_are_looked_at_before(tmp_path: Path) -> None:
    image = tmp_path / "x.sif"
    (missing,) = found({"image": str(image)}, where=tmp_path)
    assert (missing.level, missing.topic) == ("error", "container")
    image.touch()
    data, other = Path("/data/run"), tmp_path / "other"
    (fine,) = found({"image": str(image), "mounts": ["/:/"]}, data, where=tmp_path)
    assert fine.level == "ok"
    (pulled,) = found({"image": "docker://x"}, other, where=tmp_path)  # apptainer sees the working directory
    assert pulled.level == "warning" and "apptainer pull it once" in pulled.text
    (hidden,) = found({"image": str(image), "runtime": "pyxis", "mounts": [str(other.parent)]}, data, where=tmp_path)
    assert hidden.level == "warning" and "not seen inside: /data/run;" in hidden.text
    *_, renamed = found({"image": str(image), "runtime": "pyxis", "mounts": [f"{tmp_path}:/w"]}, where=tmp_path)
    assert f"not seen inside: {tmp_path};" in renamed.text, "under another name than the configuration has"
