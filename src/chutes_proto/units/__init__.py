"""Every change of rows, one transaction each."""
