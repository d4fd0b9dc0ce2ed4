import pytest

from tests.faults.table import World


@pytest.fixture(scope="session")
def whole_world(tmp_path_factory, corpus, manifests, teacher, stages):
    return World(tmp_path_factory.mktemp, corpus, manifests, teacher, stages)


@pytest.fixture
def world(whole_world, tmp_path):
    whole_world.tmp = tmp_path
    return whole_world
