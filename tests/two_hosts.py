"""Two hosts on this machine: two network namespaces, joined by a cable. It takes Linux and root.

The hosts have a network and a name of their own; they share the files, and the process ids.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from tests.launching import Finished, run

ADDRESSES = ("10.77.0.1", "10.77.0.2")  # the same in every pair of hosts: no two pairs see each other
CABLE = "cable"  # the name of its end on both hosts


class Host(NamedTuple):
    """A network namespace."""

    name: str

    def command(self, command: list[str]) -> list[str]:
        """What becomes this command on this host."""
        rename = ["unshare", "--uts", "sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *rename, *command]

    def processes(self) -> list[int]:
        """The process ids of all that runs on this host."""
        return [int(process_id) for process_id in _execute("ip", "netns", "pids", self.name).split()]

    def ranks(self) -> list[int]:
        """The process ids of the ranks on this host, without their launcher."""
        return [process_id for process_id in self.processes() if _is_rank(process_id)]

    def cut_cable(self) -> None:
        """Nothing arrives any more, in either direction; no connection is closed by that."""
        _execute("ip", "-netns", self.name, "link", "set", CABLE, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else. At the end they are gone, with all that still runs on them."""
    unique = uuid4().hex[:12]
    with _namespace(f"ppo-{unique}-a") as a, _namespace(f"ppo-{unique}-b") as b:
        _execute(*f"ip link add {CABLE} netns {a} type veth peer name {CABLE} netns {b}".split())
        for name, address in zip((a, b), ADDRESSES, strict=True):
            _execute(*f"ip -netns {name} address add {address}/24 dev {CABLE}".split())
            _execute(*f"ip -netns {name} link set {CABLE} up".split())
            _execute(*f"ip -netns {name} link set lo up".split())
        yield Host(a), Host(b)


@contextmanager
def launched(
    commands: list[list[str]], cwd: Path, timeout: float
) -> Iterator[tuple[tuple[Host, Host], list[Future[Finished]]]]:
    """Run a command on each of two new hosts: the hosts, and what will have become of the commands."""
    # The hosts are left first, so that nobody waits for a command that would not end.
    with ThreadPoolExecutor(2) as pool, two_hosts() as hosts:
        # No name leads to an address here, so gloo must be told which interface to use.
        env = {"GLOO_SOCKET_IFNAME": CABLE}
        yield (
            hosts,
            [
                pool.submit(run, host.command(command), cwd, timeout, env)
                for host, command in zip(hosts, commands, strict=True)
            ],
        )


def why_impossible() -> str | None:
    """Why there can be no two hosts on this machine, if so."""
    if shutil.which("ip") is None:
        return "needs the command ip"
    try:
        with two_hosts() as hosts:
            for host in hosts:
                _execute(*host.command(["true"]))
    except subprocess.CalledProcessError as error:
        return f"needs network namespaces, but {' '.join(error.cmd)} says: {error.stderr.strip()}"
    return None


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _execute("ip", "netns", "add", name)
    try:
        yield name
    finally:
        while left := Host(name).processes():
            for process_id in left:
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
        _execute("ip", "netns", "delete", name)


def _execute(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _is_rank(process_id: int) -> bool:
    with suppress(OSError):  # it may end while we look
        variables = Path(f"/proc/{process_id}/environ").read_bytes().split(b"\0")
        return any(variable.startswith(b"RANK=") for variable in variables)
    return False
