"""Passphrases: their seal, and their lifecycle by generations (NIST SP 800-57)."""
