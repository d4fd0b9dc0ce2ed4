"""Attacks on the finished pipeline, as tables that anyone can add a line to.

Each module here is a group and has a list ``CASES`` of lines ``Case(name, do, wanted)``: what is done to a
:class:`faults.table.World`, and what must come out of it. Lines of a few seconds and more are ``slow=True``:
``make test`` leaves them to ``make faults``, which prints what was tried and passed of each group. In its
environment, ``FAULT_MOMENTS`` is the number of random moments a signal is sent at (20), ``FAULT_MUTATIONS``
that of random changes to a file (3,000), and ``FAULT_SEED`` what both follow from (0).
"""
