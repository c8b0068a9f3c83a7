r"""Put a job's commands into a container, in the words of the tool that starts it.

    apptainer  srun ... apptainer exec --nv --pwd W --bind /data IMAGE env NAME=VALUE python -m megatron_xmtf ...
    pyxis      srun ... --container-image=IMAGE --container-mounts=/data --container-workdir=W env NAME=VALUE python ...

* W is the directory that relative paths start from: with pyxis a command would begin in the image's own.
* `env` inside: with both tools what an image sets wins over what the job exports.
* `slurm.node_local_directory` is mounted as well: the kernels' caches lie there.
* pyxis writes mounts into a shell script of enroot's, and that a line of fstab(5): a space goes as \040, and what a
  shell would read is refused (`config/slurm.py`).

Source:  apptainer-exec(1), "Bind Paths and Mounts" of Apptainer's user guide; pyxis' `srun --help`, its args.c and
         enroot-mount.c for what becomes of a mount.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_xmtf.config.slurm import ContainerConfig, SlurmConfig

__all__ = ["inside_words", "is_file", "srun_options", "unseen"]

APPTAINER_SEES = ("/tmp", "/var/tmp")
"""Mounted by apptainer by itself, beside the home and the working directory, unless the site says otherwise."""


def srun_options(slurm: SlurmConfig, *, working_directory: Path) -> list[str]:
    """Return the options of srun that put its tasks into a container: pyxis'; none for others."""
    container = slurm.container
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(mount.replace(" ", "\\040") for mount in _mounts(slurm, container))
    return [
        f"--container-image={container.image}",
        *([f"--container-mounts={mounts}"] if mounts else []),
        f"--container-workdir={working_directory}",
    ]


def inside_words(slurm: SlurmConfig, python: str, *, working_directory: Path) -> list[str]:
    """Return the words that start Python in the job, its container's among them."""
    container = slurm.container
    if container is None:
        return [python]
    variables = [f"{name}={value}" for name, value in sorted(slurm.environment.items())]
    words = ["env", *variables, python] if variables else [python]
    if container.runtime == "pyxis":
        return words
    binds = [word for mount in _mounts(slurm, container) for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", "--pwd", str(working_directory), *binds, container.image, *words]


def is_file(container: ContainerConfig) -> bool:
    """Whether the image is a path, not a name in a registry."""
    if container.runtime == "pyxis":
        return container.image.startswith(("/", "."))
    return "://" not in container.image


def unseen(slurm: SlurmConfig, paths: Iterable[Path], *, working_directory: Path) -> list[Path]:
    """Return those of the absolute paths that are not found inside the container under their own names."""
    container = slurm.container
    if container is None:
        return []
    seen = [Path(source) for source, inside in map(_ends, _mounts(slurm, container)) if source == inside]
    if container.runtime == "apptainer":
        seen += [working_directory, Path.home(), *map(Path, APPTAINER_SEES)]
    return [path for path in dict.fromkeys(paths) if not any(path.is_relative_to(place) for place in seen)]


def _mounts(slurm: SlurmConfig, container: ContainerConfig) -> Sequence[str]:
    mounts = list(container.mounts)
    cache = slurm.node_local_directory
    if cache is not None and all(_ends(mount)[0] != cache for mount in mounts):
        mounts.append(cache)
    return mounts


def _ends(mount: str) -> tuple[str, str]:
    """Return a mount's place outside and inside: /a -> /a, /a; /a:/b:ro -> /a, /b."""
    outside, _, rest = mount.partition(":")
    return outside.rstrip("/") or "/", (rest.split(":")[0] or outside).rstrip("/") or "/"
