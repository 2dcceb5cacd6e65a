"""Collateral for platforms: its choice, its fetching and its cache."""
