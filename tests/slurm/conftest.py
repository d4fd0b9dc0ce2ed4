"""A real SLURM for the tests of this folder, which run by `make test-slurm` alone."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.slurm.cluster import CASES, DAEMONS, Cluster, World


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if os.geteuid() or not all(map(shutil.which, DAEMONS)):
        pytest.skip("needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge")
    configured = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
    if os.environ.get("SLURM_CONF") or any(map(os.path.exists, configured)):
        pytest.skip("a SLURM is configured here already")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def results(cluster, manifests, teacher, tmp_path_factory):
    """The futures of all cases, which wait for SLURM most of the time."""
    folder = tmp_path_factory.mktemp("cases")
    with ThreadPoolExecutor(len(CASES)) as pool:
        futures = {}
        for name, function in CASES.items():
            (folder / name).mkdir()
            futures[name] = pool.submit(function, World(cluster, folder / name, manifests, teacher))
        yield futures
