"""What was given in place of a checkpoint is recognised, and its converter named."""

import pytest

from exports import huggingface
from tests.helpers.convert import GOLDEN, RECORDED, hf_model
from tests.helpers.models import ungated
from utils.checkpoint import read_checkpoint
from utils.files import UserError


def refusal(path):
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    return str(error.value)


@pytest.mark.parametrize("name", RECORDED)
def test_a_raw_checkpoint_names_its_converter(name):
    path = GOLDEN / f"{name}.pt"
    assert refusal(path).endswith(
        f"{path}: not yet a checkpoint of this project; convert it with {RECORDED[name]} --ckpt {path}"
    )


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_folder_of_transformers_names_its_converter(file, tmp_path):
    hf_model("wavlm").save_pretrained(tmp_path)
    assert f"convert it with convert_wavlm_from_hf.py --model {tmp_path}" in refusal(tmp_path / file)
    (tmp_path / "config.json").write_text('{"model_type": "data2vec-audio"}')
    assert "a model of the type data2vec-audio; only HuBERT" in refusal(tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    assert ("is damaged" if file else "is a folder") in refusal(tmp_path / file)


def test_an_export_names_its_converter(tmp_path):
    huggingface.export(ungated("hubert_base").eval(), tmp_path / "model", {})
    assert "convert it with convert_hubert_from_hf.py" in refusal(tmp_path / "model")
