"""Measurements of time and memory, as ratios within one run: ``python -m bench [SUBJECT…]``, or ``make bench``.

A subject is a module of this package with a function ``run() -> None`` that prints. Nothing is asserted: machines
differ, and so do runs; the compared parts are measured alternately, in one process on one core.
"""
