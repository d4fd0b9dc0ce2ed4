import pytest

from tests.helpers.stages import call, flags, sentence_of


@pytest.fixture
def distil(monkeypatch, capsys, manifests, teacher, tmp_path):
    """Runs stage 1 in this process, in a folder of ``tmp_path``; returns what it said."""

    def distil(folder, *more, **changes):
        capsys.readouterr()
        arguments = flags(manifests, teacher, tmp_path / folder, num_workers=0, **changes)
        call(monkeypatch, "distill", *arguments, *more)
        return capsys.readouterr().err

    return distil


@pytest.fixture
def refused(monkeypatch, capsys, manifests, teacher, tmp_path):
    """Runs stage 1 in this process, in a folder of ``tmp_path``, which must fail; returns the sentence."""

    def refused(folder, *more, **changes):
        arguments = flags(manifests, teacher, tmp_path / folder, num_workers=0, **changes)
        return sentence_of(monkeypatch, capsys, "distill", *arguments, *more)

    return refused
