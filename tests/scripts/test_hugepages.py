"""scripts/lib/hugepages, with a pool that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

import hugepages
from hugepages import PAGE_BYTES, HugePages


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten pages, of which three are free and one of those is promised."""
    made = tmp_path / "hugepages-2048kB"
    made.mkdir()
    for name, value in (("nr_hugepages", 10), ("free_hugepages", 3), ("resv_hugepages", 1)):
        (made / name).write_text(f"{value}\n")
    monkeypatch.setattr(hugepages, "_POOLS", tmp_path)
    monkeypatch.setattr(hugepages, "_available_bytes", lambda: 100 * PAGE_BYTES)
    return made


def size(pool: Path) -> int:
    return int((pool / "nr_hugepages").read_text())


def test_what_is_missing_is_borrowed_and_given_back(pool: Path) -> None:
    pages = HugePages(5 * PAGE_BYTES - 1)
    assert pages.borrow() is None
    assert size(pool) == 13
    (pool / "nr_hugepages").write_text("20\n")  # somebody else wants some as well
    pages.give_back()
    pages.give_back()
    assert size(pool) == 17


def test_what_is_there_is_enough(pool: Path) -> None:
    pages = HugePages(2 * PAGE_BYTES)
    assert pages.borrow() is None
    pages.give_back()
    assert size(pool) == 10


def test_memory_is_left_for_others(pool: Path) -> None:
    assert HugePages(60 * PAGE_BYTES).borrow() == "too little memory to spare"
    assert size(pool) == 10


def test_a_kernel_that_has_no_more(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        HugePages,
        "_write",
        lambda _pages, name, value: (pool / name).write_text(f"{min(value, 11)}\n"),
    )
    assert HugePages(5 * PAGE_BYTES).borrow() == "the kernel had 1 of 3 pages to give"
    assert size(pool) == 10


def test_a_kernel_without_huge_pages(pool: Path) -> None:
    (pool / "free_hugepages").unlink()
    assert HugePages(PAGE_BYTES).borrow() == "No such file or directory"


def test_pages_of_another_size(pool: Path) -> None:
    pool.rename(pool.with_name("hugepages-4096kB"))
    pages = HugePages(7 * PAGE_BYTES, 2 * PAGE_BYTES)
    assert pages.borrow() is None
    assert size(pool.with_name("hugepages-4096kB")) == 12
    pages.give_back()
    assert HugePages(PAGE_BYTES).borrow() == "No such file or directory"
