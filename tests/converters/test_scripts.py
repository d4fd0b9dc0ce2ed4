"""The converters' scripts as a user runs them, in processes of their own."""

import subprocess
import sys

import pytest

from tests.helpers.convert import (
    GOLDEN,
    RECORDED,
    assert_layers_equal,
    hf_model,
    load,
    run_with_torch_alone,
)
from tests.helpers.stages import ENVIRONMENT, ROOT


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def process(script, *flags, folder):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )


@pytest.mark.parametrize("family", ["hubert", slow("wav2vec2"), slow("wavlm")])
def test_hf_scripts_convert_and_print_one_line(family, tmp_path):
    hf_model(family, head="ForCTC").save_pretrained(tmp_path / "my-model")
    done = process(f"convert_{family}_from_hf.py", "--model", "my-model", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("my-model -> pretrained/my-model.hf.pth: ") and done.stdout.count("\n") == 1
    assert load(tmp_path / "pretrained" / "my-model.hf.pth").get_num_params() > 0


@pytest.mark.parametrize(
    "name", ["fairseq_hubert_base", slow("fairseq_wav2vec2_base"), slow("unilm_wavlm_base")]
)
def test_fairseq_scripts_convert_with_torch_alone(name, tmp_path):
    done = run_with_torch_alone(tmp_path, ROOT / RECORDED[name], "--ckpt", GOLDEN / f"{name}.pt")
    assert (done.returncode, done.stderr) == (0, "")
    kind = "unilm" if "unilm" in name else "fairseq"
    assert_layers_equal(tmp_path / "pretrained" / f"{name}.{kind}.pth", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flag"),
    [("convert_hubert_from_fairseq.py", "--ckpt"), ("convert_hubert_from_hf.py", "--model")],
)
def test_a_refusal_is_one_line_and_exit_status_2(script, flag, tmp_path):
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text('{"model_type": "bert"}')
    done = process(script, flag, "wrong", "--out", "out.pth", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script}: error: wrong: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()
