"""Numbered packets for a machine's network card, from the host, at a steady rate.

The card's netdev is one end of a pair of sockets: nothing on the way drops a packet, and none is
counted that the socket has not taken.
"""

import socket
import threading
import time

from kexeclab import LabError

#: Before the number: to everybody, from nobody, of a type for experiments (RFC 9542, appendix B.2).
HEADER = b"\xff" * 6 + b"\x02pkern" + b"\x88\xb5"
LENGTH = 60  # the shortest frame of Ethernet, without its checksum
_WAITING_BYTES = 16 << 20  # what QEMU has not read yet, if it gets no time for it


def frame(number: int) -> bytes:
    """The packet of that number."""
    return (HEADER + number.to_bytes(8, "big")).ljust(LENGTH, b"\0")


def number_of(packet: bytes) -> int:
    """The number in a packet of ``frame``; -1 in any other."""
    start = len(HEADER)
    number = int.from_bytes(packet[start : start + 8], "big")
    return number if packet == frame(number) else -1


class Feed:
    """Sends frames 0, 1, 2, ... on the netdev ``name``, between ``start`` and ``stop``.

    :ivar sent: when each packet was sent (time.monotonic), in order
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent: list[float] = []
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        # SO_SNDBUFFORCE, for root: QEMU on a busy machine may be seconds late.
        self._ours.setsockopt(socket.SOL_SOCKET, 32, _WAITING_BYTES)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def descriptor(self) -> int:
        """QEMU's end, to be passed on to it."""
        return self._theirs.fileno()

    def options(self) -> list[str]:
        """QEMU's options for the netdev."""
        return ["-netdev", f"dgram,id={self.name},local.type=fd,local.str={self.descriptor}"]

    def passed_on(self) -> None:
        """QEMU has its end now."""
        self._theirs.close()

    def start(self, rate: float, limit: int) -> None:
        """Begin: ``rate`` packets in a second, until ``limit`` of them are sent in all.

        :raises LabError: it has begun already.
        """
        if self._thread is not None:
            raise LabError(f"feed {self.name}: started twice")
        self._ended.clear()
        self._thread = threading.Thread(target=self._send, args=(rate, limit), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No packet more is sent from now on."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None

    def close(self) -> None:
        """End for good."""
        self.stop()
        self._ours.close()
        self._theirs.close()

    def _send(self, rate: float, limit: int) -> None:
        started, before = time.monotonic(), len(self.sent)
        while len(self.sent) < limit:
            due = started + (len(self.sent) - before) / rate
            if self._ended.wait(max(0.0, due - time.monotonic())):
                return
            try:
                self._ours.send(frame(len(self.sent)))
            except BlockingIOError:
                self._ended.wait(0.05)  # not taken, so not sent
            except ConnectionError:
                return  # QEMU has gone
            else:
                self.sent.append(time.monotonic())
