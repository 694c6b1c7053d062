"""Real clusters on one machine: SLURM, and machines with network and disk of their own. `make test-cluster` runs it.

It needs root and Debian's slurm-wlm, munge and iproute2. Each test trains the networks of the profile `quick`, loses a
worker meanwhile, and must come to the tables of a run on this machine.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from reprolib.files import paths

pytestmark = pytest.mark.skipif(not os.environ.get("REPROLIB_CLUSTER"), reason="make test-cluster runs it")
PROFILE = "quick"
DASK = [sys.executable, "-m", "dask"]
WORKER = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]  # as README says
NETWORKS = [sys.executable, "-m", "reprolib.workflow.graph", "--cores", "2", "reproduce", "--budget", "5h"]
SLURM = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort=17817
SlurmdPort=17818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def alone(computed, tmp_path_factory):
    """The table of a run on this machine."""
    home = tmp_path_factory.mktemp("alone")
    assert subprocess.run(reproduce(), env=surroundings(home), check=False).returncode == 0
    return computed(home, PROFILE)


@pytest.fixture
def start(tmp_path):
    """Start programs that end with the test; what they say is in the file `log`."""
    with contextlib.ExitStack() as stack, (tmp_path / "log").open("w") as log:

        def call(*command, **kinds):
            process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, **kinds)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield call


def reproduce(*more):
    return [*NETWORKS, "--profile", PROFILE, *more]


def surroundings(home, **more):
    return os.environ | {"REPROLIB_HOME": str(home), **more}


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.fail(f"{program} is missing: apt-get install slurm-wlm munge iproute2")


def wait_for(true, what, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.5)


def records_of(home):
    return len(list((home / "results" / PROFILE / "runs").glob("*/record.json")))


def test_slurm(alone, computed, start, tmp_path):
    """A real SLURM of one node: a job for each worker, one of which is killed while it trains."""
    need("munged", "mungekey", "slurmctld", "slurmd", "srun", "scancel")
    host = socket.gethostname()
    for name in ("munge", "state", "spool"):
        (tmp_path / name).mkdir(mode=0o755)
    configuration = tmp_path / "slurm.conf"
    configuration.write_text(SLURM.format(host=host, folder=tmp_path, cores=os.cpu_count()))
    key = tmp_path / "munge" / "key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
    files = [f"--{name}={tmp_path}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    start("munged", "--foreground", "--force", f"--key-file={key}", *files)
    environment = surroundings(tmp_path, SLURM_CONF=str(configuration))
    wait_for((tmp_path / "munge" / "socket").exists, "munged does not start")
    start("slurmctld", "-D", "-f", configuration, env=environment)
    start("slurmd", "-D", "-f", configuration, env=environment)

    def says(*command):
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    wait_for(lambda: "idle" in says("sinfo", "--noheader"), (tmp_path / "log").read_text)
    address = "tcp://127.0.0.1:18787"
    start(*DASK, "scheduler", "--port", "18787", cwd=tmp_path)
    for _ in range(2):
        start("srun", "--ntasks", "1", *DASK, "worker", address, *WORKER, env=environment)
    front = start(*reproduce("--scheduler", address), env=environment)
    wait_for(lambda: records_of(tmp_path) >= 2, (tmp_path / "log").read_text, seconds=600)
    first, second = says("squeue", "--noheader", "--format=%i", "--states=R").split()
    subprocess.run(["scancel", "--signal=KILL", first], env=environment, check=True)
    assert front.wait() == 0, (tmp_path / "log").read_text()
    assert says("squeue", "--noheader", "--format=%i", "--states=R").split() == [second]
    assert computed(tmp_path, PROFILE) == alone


def test_machines_without_a_common_disk(alone, computed, start, tmp_path):
    """Network namespaces, each worker with an empty disk where the results lie; one of them is killed."""
    need("ip", "unshare", "mount")
    home = tmp_path / "home"
    home.mkdir()
    with contextlib.ExitStack() as stack:

        def ip(*arguments):
            subprocess.run(["ip", *arguments], check=True)

        ip("link", "add", "reprolib0", "type", "bridge")
        stack.callback(ip, "link", "delete", "reprolib0")
        ip("link", "set", "reprolib0", "up")
        names = ["reprolib-head", "reprolib-1", "reprolib-2"]
        for number, name in enumerate(names, 1):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("link", "add", f"reprolib{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"reprolib{number}", "master", "reprolib0", "up")
            for device, address in (("lo", None), ("eth0", f"10.77.0.{number}/24")):
                if address:
                    ip("-n", name, "address", "add", address, "dev", device)
                ip("-n", name, "link", "set", device, "up")
        inside = ["ip", "netns", "exec"]
        address = "tcp://10.77.0.1:8786"
        start(*inside, names[0], *DASK, "scheduler", "--host", "10.77.0.1", "--no-dashboard", cwd=tmp_path)
        empty = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{home}" && exec "$@"', "sh"]
        workers = [
            start(*inside, name, *empty, *DASK, "worker", address, *WORKER, "--no-nanny", env=surroundings(home))
            for name in names[1:]
        ]
        front = start(*inside, names[0], *reproduce("--scheduler", address), env=surroundings(home))
        wait_for(lambda: records_of(home) >= 2, (tmp_path / "log").read_text, seconds=600)
        workers[0].kill()
        assert front.wait() == 0, (tmp_path / "log").read_text()
        assert workers[1].poll() is None and computed(home, PROFILE) == alone
        for worker in workers:
            worker.kill()
            worker.wait()


def test_what_readme_says_is_what_is_tried():
    assert " ".join(["dask worker tcp://host:8786", *WORKER[:4]]) in (paths.ROOT / "README.md").read_text()
