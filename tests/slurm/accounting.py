"""The accounting of a virtual cluster: slurmdbd before a MariaDB of its own, both in the cluster's directory."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

COMMANDS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb", "my_print_defaults")
SEARCH_PATH = "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"

SLURM_LINES = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={directory}/munge.socket
"""

CONFIGURATION = """\
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
PidFile={directory}/slurmdbd.pid
LogFile={directory}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=root
StorageLoc=slurm
"""
"""slurmdbd looks for its slurmdbd.conf beside the slurm.conf that SLURM_CONF names."""


def why_no_accounting() -> str | None:
    """Say why there can be no accounting here; None: there can."""
    missing = [name for name in COMMANDS if shutil.which(name, path=SEARCH_PATH) is None]
    wanted = "apt-get install slurmdbd mariadb-server-core mariadb-client-core"
    return f"no {', '.join(missing)}: {wanted}" if missing else None


class Database:
    """A MariaDB that no password guards, on this machine's own address; ends with the test."""

    def __init__(self, directory: Path, *, port: int) -> None:
        self.port = port
        data, socket = directory / "mariadb", directory / "mariadb.socket"
        # A bare server: no configuration of the system's, small buffers, no log for replicas.
        common = [f"--datadir={data}", "--user=root"]
        install = ["mariadb-install-db", "--no-defaults", *common, "--auth-root-authentication-method=normal"]
        done = subprocess.run([*install, "--skip-test-db", "--skip-name-resolve"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        path = shutil.which("mariadbd", path=SEARCH_PATH)
        assert path is not None
        sizes = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--skip-log-bin"]
        network = ["--bind-address=127.0.0.1", f"--port={port}", f"--socket={socket}", "--skip-grant-tables"]
        with open(directory / "mariadb.log", "w", encoding="utf-8") as log:
            self._server = subprocess.Popen([path, "--no-defaults", *common, *sizes, *network], stdout=log, stderr=log)
        self._ping = ["mariadb", "--no-defaults", f"--socket={socket}", "--execute=select 1"]

    def is_up(self) -> bool:
        """Whether it answers."""
        assert self._server.poll() is None, "mariadbd has ended; mariadb.log says why"
        return subprocess.run(self._ping, capture_output=True, check=False).returncode == 0

    def close(self) -> None:
        """End it."""
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
