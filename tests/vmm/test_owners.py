"""pkernfs.vmm.owners: who the processes are, and what they cannot reach."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from children import Say, run_each
from pkernfs.errors import VmmError
from pkernfs.vmm import live_update
from pkernfs.vmm.owners import become_owner

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")

#: Numbers that no user of a test machine has.
ALICE, BOB = 3_000_001, 3_000_002


@pytest.fixture
def tenants(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Path]:
    """A directory each of root and two users, which no other user can enter."""
    short_path.chmod(0o711)
    monkeypatch.setattr(live_update, "RUN", short_path)
    made = {uid: short_path / f"of-{uid}" for uid in (0, ALICE, BOB)}
    for uid, path in made.items():
        path.mkdir(mode=0o700)
        os.chown(path, uid, uid)
    return made


def tell_who(directory: Path, say: Say) -> int:
    become_owner(directory)
    say(f"{os.getresuid()} {os.getresgid()} {os.getgroups()}")
    (directory / "mine").touch()
    return 0


def test_each_is_its_owner(tenants: dict[int, Path]) -> None:
    """With the real, effective and saved numbers, and no group of root's."""
    before = os.getgroups()
    said: list[str] = []
    assert run_each(list(tenants.values()), tell_who, said.append) == [0, 0, 0]
    assert said == [
        f"{(0,) * 3} {(0,) * 3} {before}",
        *(f"{(uid,) * 3} {(uid,) * 3} {[uid]}" for uid in (ALICE, BOB)),
    ]
    for uid, path in tenants.items():
        assert (path / "mine").stat().st_uid == uid
    assert os.getresuid() == (0, 0, 0)


def test_none_reaches_the_others(tenants: dict[int, Path]) -> None:
    def reach(directory: Path, say: Say) -> int:
        become_owner(directory)
        for other in tenants.values():
            try:
                os.listdir(other)
            except PermissionError:
                continue
            say(other.name)
        return 0

    said: list[str] = []
    run_each([tenants[ALICE], tenants[BOB]], reach, said.append)
    assert said == [tenants[ALICE].name, tenants[BOB].name]


def test_directories_for_monitors_are_their_users(tenants: dict[int, Path]) -> None:
    """Below one that is root's, and nobody else enters them; twice the same."""
    for _ in range(2):
        run_each([tenants[ALICE], tenants[BOB]], tell_who, lambda _: None)
        above = live_update.RUN / "live-update"
        assert (above.stat().st_uid, above.stat().st_mode & 0o777) == (0, 0o755)
        for uid in (ALICE, BOB):
            found = live_update.run_directory(uid).stat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (uid, uid, 0o700)


def test_a_user_stays_who_it_is(tenants: dict[int, Path]) -> None:
    """It has only its own rights in the directories of others."""

    def work(directory: Path, say: Say) -> int:
        become_owner(directory)
        become_owner(tenants[BOB])
        say(str(os.geteuid()))
        return 0

    said: list[str] = []
    run_each([tenants[ALICE]], work, said.append)
    assert said == [str(ALICE)]


def test_a_directory_that_is_not_there_is_for_others_to_tell(tenants: dict[int, Path]) -> None:
    become_owner(tenants[0] / "none")
    assert os.geteuid() == 0


def test_no_place_for_monitors(tenants: dict[int, Path]) -> None:
    """One line, and the process is root's as before."""
    (live_update.RUN / "live-update").touch()
    with pytest.raises(VmmError, match=r"of-3000001: cannot be its owner: .*live-update"):
        become_owner(tenants[ALICE])
    assert os.geteuid() == 0
