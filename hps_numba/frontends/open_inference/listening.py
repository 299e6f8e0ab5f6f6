"""A listening socket, and its end without losing connections.

A connection that the system has accepted waits in the socket's queue; when the socket is closed, the system resets it, and with
it a request that its client may have sent. So, before it is closed, a filter makes the system ignore new clients, who try again
and are refused, and what waits is accepted.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys

from hps_numba.errors import ConfigError

__all__ = ["BACKLOG", "SETTLE", "ignore_new_clients", "listen"]

BACKLOG = 2048
SETTLE = 0.3  # seconds in which what waits is accepted

_SO_ATTACH_FILTER = 26  # of Linux
_DROP_ALL = struct.pack("HBBI", 6, 0, 0, 0)  # BPF: return 0 bytes of the packet


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, which several processes may accept from.

    Raises:
        ConfigError: the host is none.   OSError: the address is not of this machine, or in use.
    """
    try:
        if not host:
            raise ValueError("it is empty")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, ValueError) as problem:  # names that are too long, or have characters that names have not
        raise ConfigError(f"host: expected an address or a name of this machine, got {host[:100]!r}: {problem}") from None
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


def ignore_new_clients(listening: socket.socket) -> bool:
    """Let no more connections into the socket's queue; whether the system can (Linux only)."""
    if sys.platform != "linux":
        return False
    program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
    return True
