"""Clients as objects that own their connection and their driver, one file each: who boots does not load miners."""
