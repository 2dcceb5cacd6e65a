"""What takes how long, as ratios within one run: ``python -m bench [SUBJECT…]``, or ``make bench``.

A subject is a module of this package with ``run() -> None`` that prints. Nothing is asserted: machines differ, and so
do runs; what is compared is measured in turns, in one process on one core.
"""
