"""Borrow huge pages, of 2 MiB or another size, from the kernel and give them back."""

from pathlib import Path

PAGE_BYTES = 2 << 20
_POOLS = Path("/sys/kernel/mm/hugepages")


class HugePages:
    """Makes the pool large enough for ``wanted_bytes``, beside whatever others use of it."""

    def __init__(self, wanted_bytes: int, page_bytes: int = PAGE_BYTES) -> None:
        self._page_bytes = page_bytes
        self._pool = _POOLS / f"hugepages-{page_bytes >> 10}kB"
        self._wanted = -(-wanted_bytes // page_bytes)
        self._before = 0
        self._added = 0

    def borrow(self) -> str | None:
        """Grow the pool; return None, or the reason why there are not enough pages.

        Never takes more than half of the available memory.
        """
        try:
            return self._borrow()
        except OSError as error:
            self.give_back()
            return error.strerror or str(error)

    def give_back(self) -> None:
        """Shrink the pool by what it was grown; what others have added meanwhile stays."""
        added, self._added = self._added, 0
        if added:
            self._write("nr_hugepages", max(self._before, self._read("nr_hugepages") - added))

    def _borrow(self) -> str | None:
        missing = self._wanted - (self._read("free_hugepages") - self._read("resv_hugepages"))
        if missing <= 0:
            return None
        if missing * self._page_bytes > _available_bytes() // 2:
            return "too little memory to spare"
        self._before = self._read("nr_hugepages")
        self._added = missing  # noted first: an interruption from here on is given back, too
        self._write("nr_hugepages", self._before + missing)
        got = self._read("nr_hugepages") - self._before
        if got >= missing:
            return None
        self.give_back()
        return f"the kernel had {got} of {missing} pages to give"

    def _read(self, name: str) -> int:
        return int((self._pool / name).read_text())

    def _write(self, name: str, value: int) -> None:
        (self._pool / name).write_text(f"{value}\n")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
