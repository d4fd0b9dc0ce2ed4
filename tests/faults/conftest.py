from collections import Counter

import pytest

from tests.faults.table import World


@pytest.fixture(scope="session")
def whole_world(tmp_path_factory, corpus, manifests, teacher):
    world = World(tmp_path_factory.mktemp, corpus, manifests, teacher)
    yield world
    world.close()


@pytest.fixture
def world(whole_world, tmp_path):
    whole_world.tmp = tmp_path
    return whole_world


def pytest_terminal_summary(terminalreporter, config):
    """Counts of what was tried and what passed, by group, where slow cases were asked for."""
    if config.option.markexpr:
        return
    tried, passed = Counter(), Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if "test_tables.py" in report.nodeid and (report.when == "call" or outcome == "error"):
                group = report.nodeid.partition("[")[2].partition(": ")[0]
                tried[group] += 1
                passed[group] += outcome == "passed"
    if tried:
        terminalreporter.section("faults: passed of tried")
        for group in tried:
            terminalreporter.line(f"{group:12} {passed[group]:5} of {tried[group]:5}")
        terminalreporter.line(f"{'all':12} {passed.total():5} of {tried.total():5}")
