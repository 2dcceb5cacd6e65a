"""Collateral from directories and services."""
