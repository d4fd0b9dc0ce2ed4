"""Attacks on the finished pipeline, as tables that anyone can add a line to.

Each module here is a group and has a list ``CASES`` of lines ``Case(name, do, wanted)``: what is done to a
``World``, and what must come out of it. ``make faults`` runs all lines, ``make test-all`` the few that
``test_tables.py`` names. In the environment, ``FAULT_MOMENTS`` is the number of random moments that a signal
is sent at (20), ``FAULT_MUTATIONS`` that of random changes to a file (3,000), ``FAULT_SEED`` the seed (0).
"""
