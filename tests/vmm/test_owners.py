"""pkernfs.vmm.owners: who the processes are, and what they cannot reach."""

from __future__ import annotations

import os
import pty
import pwd
from pathlib import Path

import pytest

from children import Say, run_each
from pkernfs.errors import VmmError
from pkernfs.vmm import live_update, owners
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


# ------------------------------------------------------------------------------ what it leaves


def test_it_has_nothing_of_roots_surroundings(
    tenants: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token in the environment, no way back to where root is; the user's own names instead."""
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("LANG", "C.UTF-8")
    daemon = pwd.getpwnam("daemon")
    os.chown(tenants[BOB], daemon.pw_uid, daemon.pw_gid)

    def work(directory: Path, say: Say) -> int:
        become_owner(directory)
        own = {name: os.environ.get(name) for name in ("HOME", "USER", "LOGNAME", "LANG")}
        say(f"{sorted(set(os.environ) - {*own, *owners.KEPT})} {own}")
        say(f"{os.getcwd()} {os.getsid(0) == os.getpid()}")
        return 0

    said: list[str] = []
    assert run_each([tenants[ALICE], tenants[BOB]], work, said.append) == [0, 0]
    nobody = {"HOME": None, "USER": None, "LOGNAME": None, "LANG": "C.UTF-8"}
    names = {"HOME": daemon.pw_dir, "USER": "daemon", "LOGNAME": "daemon", "LANG": "C.UTF-8"}
    assert said == [f"[] {nobody}", "/ True", f"[] {names}", "/ True"]


def test_it_has_no_terminal(tenants: dict[int, Path]) -> None:
    """Whoever has root's terminal may be able to type there (TIOCSTI)."""

    def work(directory: Path, _: Say) -> int:
        become_owner(directory)
        try:
            os.open("/dev/tty", os.O_RDWR)
        except OSError:
            return 3
        return 4

    pid, terminal = pty.fork()
    if not pid:
        status = 1
        try:
            os.close(os.open("/dev/tty", os.O_RDWR))  # here there is one
            status = run_each([tenants[ALICE]], work, print)[0]
        finally:
            os._exit(status)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    finally:
        os.close(terminal)


def test_who_leads_a_terminals_session_has_to_fork(tenants: dict[int, Path]) -> None:
    pid, terminal = pty.fork()
    if not pid:
        status = 1
        try:
            become_owner(tenants[ALICE])
        except VmmError as error:
            status = 3 if "has to fork first" in str(error) and not os.geteuid() else 4
        finally:
            os._exit(status)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    finally:
        os.close(terminal)


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_directories_for_monitors_whatever_there_was(tenants: dict[int, Path], umask: int) -> None:
    """The umask is root's, and another process may have been killed when it had made one."""
    live_update.run_directory(BOB).mkdir(parents=True)
    before = os.umask(umask)
    try:
        run_each([tenants[ALICE], tenants[BOB]], tell_who, lambda _: None)
    finally:
        os.umask(before)
    assert (live_update.RUN / "live-update").stat().st_mode & 0o777 == 0o755
    for uid in (ALICE, BOB):
        found = live_update.run_directory(uid).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (uid, uid, 0o700)


# ------------------------------------------------------------------------------ the path


def test_the_path_is_the_one_that_was_checked(
    tenants: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tenants[0])
    assert become_owner(Path("../of-0")) == tenants[0]


def test_no_link_leads_to_a_guest(tenants: dict[int, Path]) -> None:
    """It could lead root to another's guest, or be exchanged after it was looked at."""
    run = live_update.RUN
    (run / "link").symlink_to(tenants[0])
    (run / "above").symlink_to(run)
    for path in (run / "link", run / "above" / "of-0"):
        with pytest.raises(VmmError, match=r"(link|above): a link, or no directory"):
            become_owner(path)


def test_others_cannot_exchange_what_is_above(tenants: dict[int, Path]) -> None:
    """Above are root's directories alone; with a sticky bit nobody exchanges another's entry."""
    above = live_update.RUN / "above"
    (above / "vm").mkdir(parents=True)
    os.chown(above, ALICE, ALICE)
    with pytest.raises(VmmError, match="above: it is above a guest's directory, and not root's"):
        become_owner(above / "vm")
    os.chown(above, 0, 0)
    for mode in (0o775, 0o757):
        above.chmod(mode)
        with pytest.raises(VmmError, match=r"above: it is above a guest's .*: others can write"):
            become_owner(above / "vm")
    above.chmod(0o1777)
    assert become_owner(above / "vm") == above / "vm"
    with pytest.raises(VmmError, match="none: no such directory, and others can make it"):
        become_owner(above / "none")


def test_a_directory_of_root_in_which_others_write(tenants: dict[int, Path]) -> None:
    """What they put there would be done as root."""
    for mode in (0o770, 0o702, 0o1777):
        tenants[0].chmod(mode)
        with pytest.raises(VmmError, match="of-0: it is root's, but others can write there"):
            become_owner(tenants[0])


def test_a_users_own_mount_can_name_any_owner(
    tenants: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tenants[0].stat().st_dev
    table = live_update.RUN / "mountinfo"
    monkeypatch.setattr(owners, "_MOUNTS", str(table))

    def be_made_by(uid: int) -> None:
        table.write_text(
            f"40 30 {os.major(device)}:{os.minor(device)} / /mnt rw,nosuid shared:7 - fuse.mine"
            f" mine,user_id=0 rw,user_id={uid},group_id=0,allow_other\n"
        )

    be_made_by(ALICE)
    with pytest.raises(VmmError, match=f"it is on a mount of user {ALICE}"):
        become_owner(tenants[0])
    be_made_by(0)
    assert become_owner(tenants[0]) == tenants[0]
