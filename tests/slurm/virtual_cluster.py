"""A real Slurm of three virtual nodes on this machine: munged, slurmctld, a slurmd a node, in a directory of its own.

Jobs take two nodes; the third takes the place of one that is lost or drained. With accounting slurmdbd and its database
run beside them.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from tests.slurm.accounting import CONFIGURATION as ACCOUNTING
from tests.slurm.accounting import SLURM_LINES, Database

NODES = ("n1", "n2", "n3")
PATIENCE = 900.0
"""Seconds for anything on a machine that does other things as well."""
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")

CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
{accounting}MailProg=/bin/true
KillWait=5
MinJobAge={remembers}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=500
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=500
NodeName=n3 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=500
PartitionName=low Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=300
PartitionName=brief Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=300
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
"""Jobs of `high` preempt those of `low` and `brief`, which have 300 s to save; those of `brief` are cancelled then."""


def why_not() -> str | None:
    """Say why no cluster can be started here; None: it can."""
    missing = [name for name in COMMANDS if shutil.which(name, path=_search_path()) is None]
    if missing:
        return f"no {', '.join(missing)}: install slurm-wlm and munge (.ci/run does, as root)"
    if os.geteuid() != 0:
        return "Slurm's daemons start jobs as root only"
    return None


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class VirtualCluster:
    """Starts when entered, and leaves no process behind."""

    def __init__(self, *, has_accounting: bool = False, remembers_seconds: int = 3600) -> None:
        """Make its directory.

        Args:  remembers_seconds: after its end, until the queue forgets a job (MinJobAge).
        """
        self.has_accounting, self._remembers_seconds = has_accounting, remembers_seconds
        self._database: Database | None = None
        self._configuration_before = os.environ.get("SLURM_CONF")
        # munge wants a short path that every user may enter.
        self.directory = Path(tempfile.mkdtemp(prefix="xmtf-slurm-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.configuration = self.directory / "slurm.conf"

    def __enter__(self) -> VirtualCluster:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.directory / name).mkdir()
        ports = free_ports(3 + len(NODES))
        accounting = {"directory": self.directory, "port": ports[-1], "database_port": ports[-2]}
        lines = (
            SLURM_LINES.format(**accounting)
            if self.has_accounting
            else "AccountingStorageType=accounting_storage/none\n"
        )
        user = getpass.getuser()
        self.configuration.write_text(
            CONFIGURATION.format(
                directory=self.directory, user=user, ports=ports, accounting=lines, remembers=self._remembers_seconds
            )
        )
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        os.environ["SLURM_CONF"] = str(self.configuration)
        try:
            names = ("key-file=munge.key", "socket=munge.socket", "pid-file=munged.pid", "log-file=munged.log")
            options = [f"--{name.replace('=', f'={self.directory}/')}" for name in (*names, "seed-file=munge.seed")]
            self._start("munged", *options)
            if self.has_accounting:
                self._start_accounting(ACCOUNTING.format(user=user, **accounting), database_port=ports[-2])
            self._start("slurmctld", "-f", str(self.configuration))
            for node in NODES:
                self._start("slurmd", "-f", str(self.configuration), "-N", node)
            wait_until(lambda: set(self.ask("sinfo", "-hN", "-t", "idle", "-o", "%N").split()) == set(NODES), "nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *outcome: object) -> None:
        subprocess.run(["scancel", "--full", "--user", getpass.getuser()], capture_output=True, check=False, timeout=60)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._ask_quietly("squeue", "-h"):
            time.sleep(0.2)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "slurmdbd", "munged"):
            path = self.directory / f"{name}.pid"
            if path.is_file():
                _end(int(path.read_text()))
        if self._database is not None:
            self._database.close()
        os.environ.pop("SLURM_CONF", None)
        if self._configuration_before is not None:
            os.environ["SLURM_CONF"] = self._configuration_before
        shutil.rmtree(self.directory, ignore_errors=True)

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm's says."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{self.log()}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED ..."""
        return self.shown(job)["JobState"]

    def shown(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says."""
        words = self.ask("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str) -> str:
        """Wait until a job has ended, or is in one of some states; a requeued one need not wait its two minutes."""
        ended = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def look() -> bool:
            shown = self.shown(job)
            is_waiting = shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime"
            # Not in the same second: the credential of the start before is revoked by then.
            if is_waiting and shown["EligibleTime"] > (datetime.now() + timedelta(seconds=5)).isoformat():
                self._ask_quietly("scontrol", "update", f"JobId={job}", "StartTime=now+2")  # or it runs already
            return shown["JobState"] in ended

        wait_until(look, lambda: f"job {job} to be {' or '.join(ended)}: {self.shown(job)}")
        state = self.state(job)
        if state == "FAILED":  # a job on its way back into the queue may show this for a moment
            time.sleep(2)
            return state if self.state(job) == state else self.wait_for(job, *states)
        return state

    def lose(self, node: str) -> None:
        """Kill a node's daemon, and say to the controller what it would find out itself in five minutes."""
        os.kill(int((self.directory / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def bring_back(self, node: str) -> None:
        """Start the daemon of a node that was lost; by ReturnToService the controller takes it back."""
        self._start("slurmd", "-f", str(self.configuration), "-N", node)
        wait_until(lambda: node in self.ask("sinfo", "-hN", "-t", "idle", "-o", "%N").split(), f"{node} to be back")

    def log(self) -> str:
        """Return the end of the controller's log."""
        path = self.directory / "slurmctld.log"
        return "\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) if path.is_file() else ""

    def _ask_quietly(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()

    def _start_accounting(self, configuration: str, *, database_port: int) -> None:
        path = self.directory / "slurmdbd.conf"
        path.touch(mode=0o600)  # it refuses one that others may read
        path.write_text(configuration)
        self._database = Database(self.directory, port=database_port)
        wait_until(self._database.is_up, "MariaDB")
        self._start("slurmdbd")
        wait_until(lambda: self._says("sacctmgr", "-i", "add", "cluster", "virtual"), "slurmdbd")

    def _says(self, *command: str) -> bool:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0

    def _start(self, name: str, *arguments: str) -> None:
        path = shutil.which(name, path=_search_path())
        assert path is not None, name
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{name}: {done.stderr}{self.log()}"


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(is_true: Callable[[], bool], what: str | Callable[[], str], *, seconds: float = PATIENCE) -> None:
    """Look again and again until something holds.

    Raises:  AssertionError: it still does not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what() if callable(what) else what}"
        time.sleep(0.2)


def _end(process: int) -> None:
    """End a daemon and wait until it is gone, or is a zombie that the first process has yet to reap."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(process, number)
            for _ in range(50):
                stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
                if stat.rpartition(")")[2].split()[0] == "Z":
                    return
                time.sleep(0.1)
        except (ProcessLookupError, FileNotFoundError):
            return
