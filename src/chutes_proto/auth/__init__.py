"""Authentication of callers: client certificates, report data, hotkeys and signed headers."""
