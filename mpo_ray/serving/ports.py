"""Ports for servers on this machine. Nothing here imports Ray."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

#: Blocks lie here: below the ports that Linux gives to connections, above Ray's range for workers, and outside the
#: ranges 30000-31000 and 40000-41000 in which Ray Serve looks for ports by itself.
FIRST, END, BLOCK = 20_000, 29_984, 32


class PortInUseError(ValueError):
    """Another program listens there already."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this host on which nobody listens. Raises OSError where the host is none of this machine's."""
    family, address = _address(host, 0)
    with socket.socket(family) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises PortInUseError; OSError where the host is none of this machine's.

    A socket that shares its port by SO_REUSEPORT counts as in use too.
    """
    family, address = _address(host, port)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections that fade away do not count
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortInUseError(f"another program listens at port {port} of {host}.") from None


@dataclass(frozen=True, slots=True)
class PortBlock:
    """Ports first … first + BLOCK - 1 of loopback, which no other owner of a block uses while `guard` is open.

    The guard listens on the first port and never answers.
    """

    first: int
    guard: socket.socket


def own_block() -> PortBlock:
    """A block in which nobody listens. Raises OSError where there is none."""
    for first in range(FIRST, END, BLOCK):
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", first))
            guard.listen(1)
            for port in range(first + 1, first + BLOCK):
                check_port("127.0.0.1", port)
        except (OSError, PortInUseError):
            guard.close()
            continue
        return PortBlock(first, guard)
    raise OSError(f"no {BLOCK} free ports in a row between {FIRST} and {END}.")


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, (str(address[0]), int(address[1]))
