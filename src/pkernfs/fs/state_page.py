"""The state page: the state itself, the handover's record, the history (docs/format.md, 4).

Fields are decoded from and put into images of the page. Who stores the page is not here.
"""

from __future__ import annotations

from typing import Any

from pkernfs.errors import CorruptionError
from pkernfs.layout import (
    ARRIVAL_FIRST_BOOT,
    ARRIVAL_LIVE_UPDATE,
    ARRIVAL_REMOUNT,
    HANDOVER,
    HANDOVER_FLAG_DIGESTS,
    HANDOVER_OFFSET,
    HISTORY,
    HISTORY_BYTES,
    HISTORY_ENTRIES,
    HISTORY_OFFSET,
    RESULT_CHANGED,
    RESULT_EVERYTHING,
    RESULT_METADATA,
    RESULT_UNKNOWN,
    STATE,
    STATE_CLEAN,
    STATE_FROZEN,
    STATE_MOUNTED,
    STATE_OFFSET,
    HandoverFields,
    HistoryFields,
    StateFields,
    uuid_text,
)

Buffer = bytes | bytearray | memoryview

STATE_NAMES = {STATE_CLEAN: "clean", STATE_MOUNTED: "mounted", STATE_FROZEN: "frozen"}
MOUNT_KINDS = {
    ARRIVAL_FIRST_BOOT: "first boot",
    ARRIVAL_LIVE_UPDATE: "live update",
    ARRIVAL_REMOUNT: "remount",
}
RESULTS = {
    RESULT_UNKNOWN: "unknown",
    RESULT_METADATA: "metadata unchanged",
    RESULT_EVERYTHING: "unchanged",
    RESULT_CHANGED: "changed",
}


def load(page: bytes | memoryview) -> StateFields:
    """Decode the state page (already checked as a page).

    :raises CorruptionError: a state that does not exist.
    """
    state = StateFields(*STATE.unpack_from(page, STATE_OFFSET))
    if state.state not in STATE_NAMES:
        raise CorruptionError(f"state page: bad state: got {state.state}")
    return state


def read_record(state_page: Buffer) -> HandoverFields:
    """The handover record; all zero if there is none."""
    return HandoverFields(*HANDOVER.unpack_from(state_page, HANDOVER_OFFSET))


def write_record(state_page: bytearray | memoryview, record: HandoverFields) -> None:
    """Put a record into the image of a state page."""
    HANDOVER.pack_into(state_page, HANDOVER_OFFSET, *record)


def read_history(state_page: Buffer) -> list[HistoryFields]:
    """The history, the newest entry first."""
    found = []
    for i in range(HISTORY_ENTRIES):
        entry = HistoryFields(*HISTORY.unpack_from(state_page, HISTORY_OFFSET + i * HISTORY_BYTES))
        if not entry.mounted_at:
            break
        found.append(entry)
    return found


def push_history(state_page: bytearray | memoryview, entry: HistoryFields) -> None:
    """Add an entry in front; the oldest one goes if there are too many."""
    end = HISTORY_OFFSET + (HISTORY_ENTRIES - 1) * HISTORY_BYTES
    older = bytes(state_page[HISTORY_OFFSET:end])
    state_page[HISTORY_OFFSET + HISTORY_BYTES : end + HISTORY_BYTES] = older
    set_newest(state_page, entry)


def set_newest(state_page: bytearray | memoryview, entry: HistoryFields) -> None:
    """Replace the newest entry."""
    data = HISTORY.pack(*entry)
    state_page[HISTORY_OFFSET : HISTORY_OFFSET + HISTORY_BYTES] = data + bytes(
        HISTORY_BYTES - len(data)
    )


def describe(state_page: Buffer, frozen: bool) -> dict[str, Any]:
    """Record and history for ``pkernfs info --json``."""
    record = read_record(state_page)
    facts: dict[str, Any] = {"handover": None}
    if frozen:
        facts["handover"] = {
            "number": record.number,
            "handed_over_ns": record.handed_over_at,
            "boot_id": uuid_text(record.boot_id),
            "digests": bool(record.flags & HANDOVER_FLAG_DIGESTS),
        }
    facts["history"] = [_describe_entry(entry) for entry in read_history(state_page)]
    return facts


def _describe_entry(entry: HistoryFields) -> dict[str, Any]:
    handed_over = bool(entry.handed_over_at)
    return {
        "arrival": MOUNT_KINDS.get(entry.arrival, "unknown"),
        "handover": entry.number if handed_over else None,
        "handed_over_ns": entry.handed_over_at,
        "mounted_ns": entry.mounted_at,
        "gap_ns": entry.mounted_at - entry.handed_over_at if handed_over else None,
        "boot_id_before": uuid_text(entry.boot_id_before),
        "boot_id_after": uuid_text(entry.boot_id_after),
        "result": RESULTS.get(entry.result, "unknown"),
        "changed": entry.changed,
    }
