"""First on PYTHONPATH of a kernel, this refuses every connection that leaves the machine, and writes down who tried."""

import ipaddress
import os
import socket

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _local(host):
    if host in ("", "localhost", None) or isinstance(host, bytes):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback or host == "0.0.0.0"
    except ValueError:
        return False


def _guard(address):
    if isinstance(address, tuple) and not _local(address[0]):
        if log := os.environ.get("TUNEBOOK_NETLOG"):
            with open(log, "a") as f:
                f.write(f"{address[0]}\n")
        raise ConnectionRefusedError(f"the test run has no network: {address[0]} refused")


def connect(self, address):
    _guard(address)
    return _connect(self, address)


def connect_ex(self, address):
    _guard(address)
    return _connect_ex(self, address)


def getaddrinfo(host, *args, **kwargs):
    _guard((host if isinstance(host, str) else "", 0))
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, getaddrinfo
