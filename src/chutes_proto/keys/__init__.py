"""Passphrases: how they are sealed and what becomes of their generations."""
