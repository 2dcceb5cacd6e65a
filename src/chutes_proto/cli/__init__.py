"""The ``chutes-proto`` command, one file per command."""
