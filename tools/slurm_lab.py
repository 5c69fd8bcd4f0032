"""A real Slurm cluster of several nodes on one machine, for tests. Needs root, Linux and Debian's packages.

    python tools/slurm_lab.py up --nodes 2 --gpus 2      a controller and two nodes, in a few seconds
    python tools/slurm_lab.py run sinfo                  a command on the login node
    python tools/slurm_lab.py run --node node2 bash      a command on a node
    python tools/slurm_lab.py down                       removes everything, also after a crash

Each machine of the cluster is a set of namespaces (mounts, network, processes, host name) held by one process: when
that process ends, the kernel ends all processes inside and removes the network. All machines share all files except
STATE/local, which is local to each. The GPUs are null devices, which Slurm only allocates.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

DEFAULT_STATE = Path("/tmp/megasora-slurm-lab")
PACKAGES = {  # program -> Debian package
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge", "ip": "iproute2",
    "unshare": "util-linux", "nsenter": "util-linux",
}  # fmt: skip
HEAD, SUBNET, BRIDGE = "head", "10.77.0", "lab"
START_SECONDS = 20.0
LOCAL_MIB = 2048  # size of STATE/local

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={head}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
PlugStackConfig={state}/plugstack.conf
TmpFS={state}/local
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=2
SlurmdTimeout=10
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


class LabError(Exception):
    """An error for the person at the terminal."""


class Lab:
    """The cluster whose files are in the folder `state`."""

    def __init__(self, state: Path):
        self.state = state.absolute()
        if re.search(r"[^\w./+-]", str(self.state)):  # slurm.conf has no quotes
            raise LabError(f"--state {self.state}: letters, digits and ./_+- only")

    # ------------------------------------------------------------------ machines

    def mark(self, machine: str) -> str:
        """An argument of the process that holds a machine, by which `down` finds it, whichever process started it."""
        return f"slurm-lab:{self.state}:{machine}"

    def holders(self, machine: str | None = None) -> dict[int, list[str]]:
        """{process id: command line} of the processes that hold `machine`, or any machine."""
        mark, holders = self.mark(machine or ""), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            except OSError:  # the process has ended
                continue
            if any(word == mark if machine else word.startswith(mark) for word in words):
                holders[int(folder.name)] = words
        return holders

    def inside(self, machine: str) -> int | None:
        """Id of the first process inside a machine; None if the machine is not running."""
        return next((pid for pid, words in self.holders(machine).items() if words[0] == "bash"), None)

    def start_machine(self, machine: str, address: str) -> None:
        log = open(self.state / f"{machine}.log", "ab")
        # process 1 of the machine: reaps orphaned processes
        hold = f"hostname {machine} && for f in hosts nsswitch.conf; do mount --bind {self.state}/$f /etc/$f; done && "
        hold += f"mount -t tmpfs -o size={LOCAL_MIB}m none {self.state}/local && ip link set lo up && "
        hold += f"touch {self.state}/{machine}.up && while :; do sleep 3600 & wait $!; done"
        command = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command += ["bash", "-c", hold, self.mark(machine)]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/")
        log.close()
        self.wait_for((self.state / f"{machine}.up").exists, f"{machine} did not start", f"{machine}.log")
        if machine == HEAD:
            self.execute(HEAD, "ip", "link", "add", BRIDGE, "type", "bridge")
            self.execute(HEAD, "ip", "address", "add", f"{address}/24", "dev", BRIDGE)
            self.execute(HEAD, "ip", "link", "set", BRIDGE, "up")
            return
        # enter only the head's network, not its /proc, since `node` is a process id of this machine
        head, node = self.inside(HEAD), self.inside(machine)
        veth = f"ip link add {machine} type veth peer name eth0 netns {node}"
        call(["nsenter", "--target", str(head), "--net", *veth.split()])
        self.execute(HEAD, "ip", "link", "set", machine, "master", BRIDGE, "up")
        self.execute(machine, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.execute(machine, "ip", "link", "set", "eth0", "up")

    def enter(self, machine: str) -> list[str]:
        """Prefix of a command to run on `machine`, in this working directory."""
        pid = self.inside(machine)
        if pid is None:
            known = sorted(words[-1].rsplit(":", 1)[1] for words in self.holders().values() if words[0] == "bash")
            remedy = f"machines: {', '.join(known)}" if known else "start it with: up"
            raise LabError(f"the lab in {self.state} has no machine {machine}; {remedy}")
        spaces = ["--mount", "--net", "--uts", "--pid"]
        return ["nsenter", "--target", str(pid), *spaces, f"--wdns={os.getcwd()}", "--"]

    def execute(self, machine: str, *command: str) -> str:
        return call([*self.enter(machine), *command], self.environment())

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": search_path(), "SLURM_CONF": str(self.state / "slurm.conf")}

    def wait_for(self, ready, complaint: str, log: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > end:
                raise LabError(f"{complaint} within {START_SECONDS:.0f} s; {self.last_lines(log)}")
            time.sleep(0.05)

    def start_daemon(self, machine: str, log: str, *command: str) -> None:
        try:
            self.execute(machine, *command)
        except LabError as error:
            raise LabError(f"{error}; {self.last_lines(log)}") from None

    def last_lines(self, log: str) -> str:
        path = self.state / log
        lines = path.read_text(errors="replace").splitlines()[-8:] if path.is_file() else ["nothing"]
        return "\n".join([f"last lines of {path}:", *lines])

    # ------------------------------------------------------------------ commands

    def up(self, nodes: int, gpus: int, cpus: int) -> None:
        check_machine()
        if self.holders():
            raise LabError(f"the lab in {self.state} is running; stop it first with: down")
        self.remove_files()
        try:
            self.write_files(nodes, gpus, cpus)
            self.start_machine(HEAD, f"{SUBNET}.254")
            munge = f"--key-file={self.state}/munge.key --socket={self.state}/munge.socket"
            munge += f" --pid-file={self.state}/munged.pid --log-file={self.state}/munged.log"
            munge += f" --seed-file={self.state}/munged.seed --force"  # the folder may be private to root
            self.start_daemon(HEAD, "munged.log", "munged", *munge.split())
            self.wait_for((self.state / "munge.socket").exists, "munged did not start", "munged.log")
            self.start_daemon(HEAD, "slurmctld.log", "slurmctld")
            for index in range(1, nodes + 1):
                name = f"node{index}"
                self.start_machine(name, f"{SUBNET}.{index}")
                self.start_daemon(name, f"slurmd-{name}.log", "slurmd", "-N", name)
            self.wait_for(lambda: self.num_idle() == nodes, "not all nodes came up", "slurmctld.log")
        except BaseException:
            self.down()
            raise

    def num_idle(self) -> int:
        """Number of idle nodes; 0 while the controller does not answer."""
        try:
            return self.execute(HEAD, "sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
        except LabError:
            return 0

    def write_files(self, nodes: int, gpus: int, cpus: int) -> None:
        self.state.mkdir(parents=True, mode=0o755)
        for folder in ("controller", "local"):
            (self.state / folder).mkdir(mode=0o755)
        key = self.state / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for gpu in range(gpus):
            os.mknod(self.state / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
        config = SLURM_CONF.format(head=HEAD, state=self.state, nodes=nodes, cpus=cpus, gpus=gpus)
        (self.state / "slurm.conf").write_text(config)
        (self.state / "gres.conf").write_text(f"Name=gpu File={self.state}/gpu[0-{gpus - 1}]\n" if gpus else "")
        (self.state / "plugstack.conf").touch()
        hosts = [f"{SUBNET}.254 {HEAD}", *(f"{SUBNET}.{n} node{n}" for n in range(1, nodes + 1))]
        (self.state / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no DNS timeouts
        (self.state / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")

    def down(self) -> None:
        end = time.monotonic() + START_SECONDS
        while holders := self.holders():
            for pid in holders:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if time.monotonic() > end:
                raise LabError(f"processes {', '.join(map(str, holders))} cannot be killed")
            time.sleep(0.05)
        self.remove_files()

    def remove_files(self) -> None:
        """Removes the state folder. Raises LabError if it has files of others."""
        if not self.state.exists():
            return
        if any(self.state.iterdir()) and not (self.state / "controller").is_dir():
            raise LabError(f"--state {self.state} holds other files; give another folder")
        shutil.rmtree(self.state)

    def run(self, machine: str, command: list[str]) -> None:
        """Replaces this process by `command` on `machine`; does not return."""
        words = [*self.enter(machine), *command]
        os.execvpe(words[0], words, self.environment())


def search_path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"  # where Debian keeps daemons


def check_machine() -> None:
    """Raises LabError that names everything that is missing."""
    if not sys.platform.startswith("linux"):
        raise LabError("the lab needs Linux: its machines are namespaces")
    missing = {package for program, package in PACKAGES.items() if not shutil.which(program, path=search_path())}
    if missing:
        raise LabError(
            f"packages are missing; run: apt-get install --no-install-recommends {' '.join(sorted(missing))}"
        )
    if os.geteuid() != 0:
        raise LabError("the lab needs root: it makes namespaces and network devices")
    try:
        call(["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"])
    except LabError as error:
        raise LabError(f"root cannot make namespaces on this machine, perhaps a container: {error}") from None


def call(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env=environment or {**os.environ, "PATH": search_path()}, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip() or f'exit {done.returncode}'}")
    return done.stdout


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A real Slurm cluster of several nodes on this machine.")
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, metavar="DIR", help=f"default {DEFAULT_STATE}")
    commands = parser.add_subparsers(required=True, dest="command")
    up = commands.add_parser("up", help="start it")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--gpus", type=int, default=2, help="simulated GPUs per node")
    up.add_argument("--cpus", type=int, default=8, help="simulated cores per node")
    commands.add_parser("down", help="stop it and remove its files")
    run = commands.add_parser("run", help="run a command in it")
    run.add_argument("--node", default=HEAD, help="default: the login node")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        lab = Lab(options.state)
        if options.command == "up":
            if not 1 <= options.nodes <= 100 or options.gpus < 0 or options.cpus < 1:
                raise LabError("--nodes from 1 to 100, --gpus at least 0, --cpus at least 1")
            lab.up(options.nodes, options.gpus, options.cpus)
            print(f"{options.nodes} nodes are up; try: {sys.argv[0]} run sinfo")
        elif options.command == "down":
            lab.down()
        else:
            if not options.words:
                raise LabError("give a command, e.g. run sinfo")
            lab.run(options.node, options.words)
    except (LabError, OSError) as error:
        print(f"slurm_lab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
