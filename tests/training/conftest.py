import pytest

from tests.helpers.stages import call, flags


@pytest.fixture
def distil(monkeypatch, capsys, manifests, teacher, tmp_path):
    """Runs stage 1 in this process, in a folder of ``tmp_path``; returns what it said."""

    def distil(folder, **changes):
        capsys.readouterr()
        call(monkeypatch, "distill", *flags(manifests, teacher, tmp_path / folder, num_workers=0, **changes))
        return capsys.readouterr().err

    return distil


@pytest.fixture
def refused(fails, manifests, teacher, tmp_path):
    """Runs stage 1 in this process, in a folder of ``tmp_path``, which must fail; returns the sentence."""

    def refused(folder, **changes):
        return fails("distill", *flags(manifests, teacher, tmp_path / folder, num_workers=0, **changes))

    return refused
