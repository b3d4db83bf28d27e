"""Two machines out of one: Linux network namespaces, and a cable between them that can be cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

_tags = itertools.count()
SUBNET = "198.18.77"
"""Of the range that is set aside for measuring networks."""


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "iptables", "nsenter") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    try:
        with two_machines() as (one, _):
            one.run("iptables", "-L")
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` is not permitted here"
    return None


@dataclass(frozen=True, slots=True)
class Machine:
    """A namespace: what runs in it sees one interface, and reaches the other and the host."""

    name: str
    address: str

    @property
    def enter(self) -> list[str]:
        """In front of a command, it runs there."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def run(self, *command: str) -> str:
        """Run a command there to its end; what it printed.

        Raises:
            CalledProcessError: it failed.
        """
        return _run(*self.enter, *command)

    def cut_off(self) -> None:
        """Packets from anywhere else vanish, and so do the answers to what it sends: nothing is
        refused and no connection is reset."""
        self.run("iptables", "-I", "INPUT", "!", "-i", "lo", "-j", "DROP")

    def reconnect(self) -> None:
        """Undo that."""
        self.run("iptables", "-D", "INPUT", "!", "-i", "lo", "-j", "DROP")

    def processes(self) -> list[int]:
        """Everything that runs there."""
        return [int(word) for word in _run("ip", "netns", "pids", self.name).split()]

    def end(self, timeout_s: float = 10.0) -> None:
        """Kill everything that runs there."""
        until_s = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < until_s:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two namespaces on one bridge with the host, which can be reached as ``SUBNET.1``.

    Whatever runs in them when the block ends is killed.
    """
    # A name of its own each time: what a namespace held goes a moment after it.
    tag = f"dr{os.getpid()}{next(_tags)}"
    bridge = f"{tag}b"
    machines = [Machine(f"{tag}-{i}", f"{SUBNET}.{i + 2}") for i in range(2)]
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{SUBNET}.1/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, machine in enumerate(machines):
            cable = f"{tag}c{number}"
            _run("ip", "netns", "add", machine.name)
            _run(
                *("ip", "link", "add", cable, "type", "veth"),
                *("peer", "name", "eth0", "netns", machine.name),
            )
            _run("ip", "link", "set", cable, "master", bridge, "up")
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
            machine.run("ip", "link", "set", "lo", "up")
            machine.run("ip", "link", "set", "eth0", "up")
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            with contextlib.suppress(subprocess.CalledProcessError):
                machine.end()
                _run("ip", "netns", "del", machine.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", bridge)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
