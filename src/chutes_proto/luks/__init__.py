"""Disks as LUKS2 volumes: which headers are safe, and the steps for each disk. Nothing is run here."""
