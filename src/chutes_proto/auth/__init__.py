"""Who is speaking: client certificates, report data, hotkeys and signed headers."""
