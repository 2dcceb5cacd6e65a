"""Disks, by cryptsetup."""
