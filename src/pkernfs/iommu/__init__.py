"""VT-d tables that live in the region; nothing here yet (a later issue)."""
