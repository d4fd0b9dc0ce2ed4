"""Runs the tables: each line's attack must come out as its line says."""

import importlib

import pytest

GROUPS = ("kills", "disk", "files")

SAMPLE = {
    "kills: SIGKILL 1 of distill.py, two workers",
    "kills: SIGTERM 1 of distill.py, two ranks",
    "kills: SIGINT 1 of final_distill.py, alone",
    "disk: no room for stage 2's file",
    "disk: no room for a checkpoint",
    "disk: no room for batches in shared memory",
    "disk: a run to where it may not",
    "disk: a converter over its source",
    "files: random changes to run.json",
}
"""The lines that `make test-all` runs too."""


def lines():
    names = set()
    for group in GROUPS:
        for case in importlib.import_module(f"tests.faults.{group}").CASES:
            name = f"{group}: {case.name}"
            names.add(name)
            yield pytest.param(
                case, id=name, marks=pytest.mark.slow if name in SAMPLE else pytest.mark.faults
            )
    assert names >= SAMPLE, SAMPLE - names


@pytest.mark.parametrize("case", list(lines()))
def test_line(case, world):
    case.wanted(case.do(world))
