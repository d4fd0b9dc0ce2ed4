"""What ``pip install`` brings: the package ``wav2vec2``, which needs torch alone; extras for the scripts."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_string

import pytest

from tests.helpers.convert import run_with_torch_alone
from tests.helpers.stages import ROOT

SCRIPTS = {
    "prepare_data.py": "train",
    "distill.py": "train",
    "final_distill.py": "train",
    "convert_hubert_from_hf.py": "convert",
    "report.py": "eval",
    "evaluate.py": "eval",
    "group_layers.py": "eval",
    "export_to_hf.py": "export",
    "export_to_onnx.py": "export",
}
"""Scripts that need the packages of an extra."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    others = shutil.ignore_patterns(".*", "tests", "exp", "data", "pretrained", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "checkout", ignore=others)
    flags = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "checkout"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *flags], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_only_the_package_is_installed(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"wav2vec2"}
    modules = {name for name in wheel.namelist() if name.startswith("wav2vec2/")}
    assert modules == {str(path.relative_to(ROOT)) for path in (ROOT / "wav2vec2").rglob("*.py")}


def test_the_metadata_requires_torch_alone(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_string(wheel.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.6"]
    assert {*SCRIPTS.values(), "test"} <= {*metadata.get_all("Provides-Extra")}
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata["Author"] == "The speech-distill-prune authors"


def test_the_installed_package_works_where_there_is_torch_alone(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = """
import importlib, pkgutil, sys
import torch, wav2vec2
from wav2vec2 import wav2vec2_model
for module in pkgutil.walk_packages(wav2vec2.__path__, "wav2vec2."):
    importlib.import_module(module.name)
model = wav2vec2.hubert_base(num_layers=2).eval()
torch.save({"config": model.config, "state_dict": model.state_dict()}, "model.pth")
checkpoint = torch.load("model.pth", weights_only=True)
loaded = wav2vec2_model(**checkpoint["config"]).eval()
loaded.load_state_dict(checkpoint["state_dict"])
waveforms = torch.randn(1, 4000)
with torch.no_grad():
    states = [m.extract_features(waveforms)[0][-1] for m in (model, loaded)]
print(torch.equal(*states), states[0].shape[-1], wav2vec2.__file__)
"""
    done = run_with_torch_alone(tmp_path, "-c", code, site=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "768", str(tmp_path / "site" / "wav2vec2" / "__init__.py")]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_its_extra_names_it_in_one_sentence(script, tmp_path):
    done = run_with_torch_alone(tmp_path, ROOT / script)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{script}: error: the package ")
    extra = SCRIPTS[script]
    assert f'is missing: install the `{extra}` extra, pip install -e ".[{extra}]"' in done.stderr


@pytest.mark.parametrize("script", ["prune.py", "save_final_ckpt.py"])
def test_the_stages_that_do_not_train_need_no_extra(script, tmp_path):
    done = run_with_torch_alone(tmp_path, ROOT / script, "--help")
    assert (done.returncode, done.stderr) == (0, "") and "usage:" in done.stdout
