"""A SLURM of seven nodes on this machine alone, whose daemons listen on the loopback interface."""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PORT = 17_400
NODES = [f"node{number}" for number in range(1, 8)]
MARK = "# tests/slurm"

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
InactiveLimit=0
SlurmdTimeout=10
GresTypes=gpu
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=node1,node2 Default=YES PreemptMode=OFF
PartitionName=fragile Nodes=node3,node4
PartitionName=brittle Nodes=node5,node6
PartitionName=graceful Nodes=node7 PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes=node7 PriorityTier=1 GraceTime=0
PartitionName=high Nodes=node7 PriorityTier=10 PreemptMode=OFF
"""
"""Each node has room for several jobs with run.sh's header, it says: SLURM counts and does not look."""


CASES = {}
"""By their names, functions that conftest.py calls all at once with a :class:`World`."""


def case(function):
    """Makes a case of a function, which the test of its module waits for."""
    CASES[function.__name__] = function
    return function


def cases_of(module: str) -> list[str]:
    """The names of a module's cases."""
    return [name for name, function in CASES.items() if function.__module__ == module]


class Cluster:
    """The daemons and their folder.

    Attributes:
        folder: configuration, logs and state.
        environment: what SLURM's commands need to find this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        host = socket.gethostname().partition(".")[0]
        hosts = Path("/etc/hosts").read_text()
        missing = [name for name in (host, *NODES) if not re.search(rf"^127\..*\s{name}\b", hosts, re.M)]
        with open("/etc/hosts", "a") as file:
            file.writelines(f"127.0.0.1 {name} {MARK}\n" for name in missing)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        has = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=1024 RealMemory=9000000 Gres=gpu:64"
        ports = enumerate(NODES, PORT + 1)
        nodes = "\n".join(f"NodeName={name} Port={port} {has}" for port, name in ports)
        content = CONFIG.format(host=host, folder=folder, port=PORT, nodes=nodes)
        (folder / "slurm.conf").write_text(content)
        for gpu in range(64):
            (folder / f"gpu{gpu}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-63]\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()

    def start(self) -> None:
        files = {"key": "munge.key", "pid": "munged.pid", "log": "munged.log", "seed": "munged.seed"}
        flags = [f"--{name}-file={self.folder / file}" for name, file in files.items()]
        self.command("munged", "--force", f"--socket={self.folder}/munge.socket", *flags)
        self.command("slurmctld", "-f", self.folder / "slurm.conf")
        for node in NODES:
            self.start_node(node)
        self.until(
            lambda: (
                self.command("sinfo", "-hN", "-p", "main,fragile,brittle,high", "-t", "idle").count("\n") == 7
            ),
            60,
        )

    def start_node(self, node: str) -> None:
        self.command("slurmd", "-f", self.folder / "slurm.conf", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills a node's daemon; what runs on the node lives on, and SLURM finds it lost."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def stop(self) -> None:
        self.command("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self.command("scancel", "--user=root", check=False)
        with suppress(AssertionError):
            self.until(lambda: not self.command("squeue", "-h"), 40)
        for name in (*NODES, "slurmctld", "munged"):
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        lines = Path("/etc/hosts").read_text().splitlines(keepends=True)
        Path("/etc/hosts").write_text("".join(line for line in lines if MARK not in line))

    def command(self, *command, check=True, cwd=None, **variables) -> str:
        """Runs one of SLURM's commands; returns what it prints."""
        environment = {
            **os.environ,
            **self.environment,
            **{name: str(value) for name, value in variables.items()},
        }
        process = subprocess.run(
            list(map(str, command)),
            env=environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert not check or process.returncode == 0, process.stdout
        return process.stdout

    def until(self, true, seconds: float) -> None:
        """Waits until ``true()``."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.command("squeue") + self.command("sinfo", "-N")
            time.sleep(0.3)


@dataclass
class World:
    """What a case has: the cluster, a folder of its own, and the corpus and the teacher of all tests."""

    cluster: Cluster
    folder: Path
    manifests: Path
    teacher: Path


class Job:
    """A job, submitted by ``sbatch COMMAND`` in a folder, with variables."""

    def __init__(self, cluster: Cluster, *command, cwd: Path, **variables) -> None:
        self.cluster, self.cwd, self.hurried = cluster, cwd, set()
        self.id = cluster.command("sbatch", "--parsable", *command, cwd=cwd, **variables).strip()

    @property
    def output(self) -> str:
        """What the job has said, after an empty line."""
        path = self.cwd / f"slurm-{self.id}.out"
        return "\n" + path.read_text(errors="replace") if path.exists() else "\n"

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``, JobState say."""
        return re.search(rf"\b{name}=(\S*)", self.cluster.command("scontrol", "show", "job", self.id))[1]

    def state(self) -> str:
        """The job's state; it is spared most of the two minutes that SLURM lets a requeued job wait."""
        state, restarts = self.field("JobState"), self.field("Restarts")
        if state == "PENDING" and self.field("Reason") == "BeginTime" and restarts not in self.hurried:
            self.hurried.add(restarts)
            self.cluster.command("scontrol", "update", f"jobid={self.id}", "StartTime=now+2")
        return state

    def waits(self, true, seconds: float) -> None:
        try:
            self.cluster.until(true, seconds)
        except AssertionError as error:
            raise AssertionError(self.output) from error

    def says(self, text: str, times: int = 1, seconds: float = 90) -> None:
        """Waits until the job has said ``text``."""
        self.waits(lambda: self.state() and self.output.count(text) >= times, seconds)

    def ends(self, seconds: float = 90) -> tuple[str, str]:
        """Waits until the job has left the queue; returns its state, COMPLETED say, and what it has said."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.waits(lambda: self.state() in final, seconds)
        return self.state(), self.output
