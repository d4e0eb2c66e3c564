"""A real Slurm of four nodes on this machine, for the time of the tests: private ports, key and folder, no root needed.

Where the packages are missing (Debian: slurmctld slurmd slurm-client munge), tests that ask for it skip, and fail where
`LITP_REQUIRE=slurm` says so.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `box_runs`; `hold_at` for the runs that tests start

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
NODES = 4
CONFIGURATION = """
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
MailProg=/bin/true
KillWait=5
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""


@pytest.fixture(scope="session")
def slurm_box() -> Iterator[Path]:
    """Start the cluster, point `SLURM_CONF` at it, and end its daemons afterwards; the folder has their pids."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        pytest.skip(f"Slurm is not installed here: no {', '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-box-"))
    folder.chmod(0o755)  # munged wants a socket that all can reach, and pytest's own folders are closed
    (folder / "state").mkdir()
    key = folder / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    port = 20000 + 8 * os.getpid() % 10000
    text = CONFIGURATION.format(
        folder=folder, user=getpass.getuser(), nodes=NODES, port=port, first=port + 1, last=port + NODES
    )
    (folder / "slurm.conf").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            patch.delenv(name)
        try:
            _run("munged", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munge.pid",
                 f"--log-file={folder}/munge.log", f"--seed-file={folder}/seed")  # fmt: skip
            _run("slurmctld")
            nodes = [f"n{number}" for number in range(1, NODES + 1)]
            for node in nodes:
                _run("slurmd", "-N", node)
            until = time.monotonic() + 60
            while _run("sinfo", "-hN", "-p", "low", "-t", "idle", "-o", "%N").split() != nodes:
                assert time.monotonic() < until, (folder / "ctld.log").read_text()[-2000:]
                time.sleep(0.1)
            yield folder
            _run("scancel", "--full", "--user", getpass.getuser())
            while _run("squeue", "-h") and time.monotonic() < until + 600:
                time.sleep(0.2)
        finally:
            for name in (*(f"n{number}.pid" for number in range(1, NODES + 1)), "ctld.pid", "munge.pid"):
                with suppress(FileNotFoundError, ValueError, ProcessLookupError):
                    os.kill(int((folder / name).read_text()), signal.SIGTERM)
            shutil.rmtree(folder, ignore_errors=True)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()
