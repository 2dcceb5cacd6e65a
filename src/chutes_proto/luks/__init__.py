"""Disks as LUKS2 volumes: what a header may say, and what is done to a disk. It parses and judges; nothing is run."""
