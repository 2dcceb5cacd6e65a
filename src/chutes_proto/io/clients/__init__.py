"""Clients as objects that own their connection and their driver."""
