"""Runs the tables: each line's attack must come out as its line says."""

import importlib

import pytest

GROUPS = ("kills", "disk", "state", "data", "numbers", "security", "types")


def lines():
    for group in GROUPS:
        for case in importlib.import_module(f"tests.faults.{group}").CASES:
            marks = [pytest.mark.slow] if case.slow else []
            yield pytest.param(case, id=f"{group}: {case.name}", marks=marks)


@pytest.mark.parametrize("case", list(lines()))
def test_line(case, world):
    case.wanted(case.do(world))
