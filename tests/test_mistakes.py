"""A user's mistake: one sentence that names it, exit status 2, no traceback, nothing half-written."""

import pytest
import torch

from tests.helpers.models import tiny_config
from tests.helpers.stages import call, flags, run
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.files import atomic_write
from wav2vec2 import wav2vec2_model

MISTAKES = [
    ({"teacher_ckpt": "no/such.pth"}, "no/such.pth: no such file"),
    ({"teacher_ckpt": "no\x1b[2J.pth"}, r"no\x1b[2J.pth: no such file"),
    ({"teacher_ckpt": "/"}, "/: is a folder; give the file in it"),
    ({"tsv_dir": "no/such"}, "train100.tsv"),
    ({"train_subset": "train100.tsv"}, "train100.tsv.tsv"),
    ({"distill_layers": "0.9"}, "layer 9 is not one of 0 to 3"),
    ({"distill_layers": "0;3"}, "separate layers by commas"),
    ({"distill_mode": "other"}, "invalid choice: 'other'"),
    ({"pruning_units": "conv,heads"}, "heads is none of conv, head, attlayer, interm, ffnlayer"),
    ({"target_sparsity": "1.5"}, "'1.5' is not a number from 0 to below 1"),
    ({"max_updates": "0"}, "'0' is not a whole number above 0"),
    ({"learning_rate": "fast"}, "'fast' is not a number above 0"),
    ({"seed": 2**64}, "--seed"),
    ({"l1_weight": 0, "cos_weight": 0}, "are all 0"),
    ({"resume_checkpoint": "no/last.ckpt"}, "no/last.ckpt: no such file"),
    ({"max_updates": 10**19}, "is not a whole number above 0 (and below 2^31)"),
    ({"teacher_ckpt": ""}, "--teacher_ckpt: is empty"),
    ({"exp_dir": __file__}, "cannot be written to (File exists)"),
    ({"exp_dir": f"{__file__}/exp"}, "cannot be written to (Not a directory)"),
]


@pytest.mark.parametrize("changes, words", MISTAKES)
def test_a_mistake_in_stage_1_is_one_sentence(changes, words, fails, manifests, teacher, tmp_path):
    assert words in fails("distill", *flags(manifests, teacher, tmp_path / "exp", **changes))
    assert not list(tmp_path.rglob("*.ckpt"))


def stage_1(teacher, tmp_path, log_alpha=3.0):
    """A checkpoint as stage 1 writes it, with every gate at ``log_alpha``, and its path."""
    checkpoint = read_checkpoint(teacher)
    student = wav2vec2_model(**{**checkpoint["config"], "extractor_prune_conv_channels": True})
    student.load_state_dict(checkpoint["state_dict"], strict=False)
    for gate in student.gates():
        gate.log_alpha.data.fill_(log_alpha)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"student_model.{k}": v for k, v in student.state_dict().items()}}, path)
    return path


def test_pruning_a_conv_layer_to_nothing_says_what_to_lower(fails, teacher, tmp_path):
    distilled = stage_1(teacher, tmp_path, log_alpha=-20.0)
    sentence = fails("prune", "--distilled_ckpt", distilled, "--original_ckpt", teacher)
    assert "conv layer 0" in sentence and "lower --target_sparsity" in sentence
    assert not (tmp_path / "pruned_hubert_base.pth").exists()


def test_stage_2_wants_stage_1s_file_and_its_teacher(fails, teacher, tmp_path):
    distilled = stage_1(teacher, tmp_path)
    assert "student_model" in fails("prune", "--distilled_ckpt", teacher, "--original_ckpt", teacher)
    assert not (teacher.parent / "run.json").exists(), "a session that has done nothing"
    other = tmp_path / "other.pth"
    save_checkpoint(other, wav2vec2_model(**tiny_config(encoder_ff_interm_features=[48] * 3)))
    sentence = fails("prune", "--distilled_ckpt", distilled, "--original_ckpt", other)
    assert str(other) in sentence and "feed_forward" in sentence
    assert not (tmp_path / "pruned_hubert_base.pth").exists()


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_sentence(manifests, teacher, tmp_path):
    environment = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    arguments = flags(manifests, teacher, tmp_path / "exp")
    process = run("distill.py", *arguments, "--compile", check=False, **environment)
    assert process.returncode == 2, process.stderr
    assert "--compile: torch cannot compile here" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_out_names_another_file_which_is_replaced_whole(monkeypatch, capsys, teacher, tmp_path):
    files = ["--distilled_ckpt", stage_1(teacher, tmp_path), "--original_ckpt", teacher]
    out = tmp_path / "new" / "small.pth"
    out.parent.mkdir()
    # What lies there is no checkpoint: at first unknown to run.json, then known.
    for _ in range(2):
        out.write_bytes(b"half")
        call(monkeypatch, "prune", *files, "--out", out)
        assert read_checkpoint(out)["config"]
    assert not (tmp_path / "pruned_hubert_base.pth").exists()
    call(monkeypatch, "prune", *files, "--out", out)
    assert f"this stage is finished: {out}" in capsys.readouterr().out
    with pytest.raises(RuntimeError), atomic_write(out) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert read_checkpoint(out)["config"]
    assert {path.name for path in out.parent.iterdir()} == {"small.pth", "run.json"}
    assert not (tmp_path / "run.json").exists(), "the input may lie where nothing can be written"


def test_stage_3_wants_the_projections_of_stage_1(monkeypatch, fails, manifests, teacher, tmp_path):
    distilled = stage_1(teacher, tmp_path)
    call(monkeypatch, "prune", "--distilled_ckpt", distilled, "--original_ckpt", teacher)
    pruned = tmp_path / "pruned_hubert_base.pth"
    arguments = flags(manifests, teacher, tmp_path / "exp", student_ckpt=pruned, sparsity_warmup_updates=None)
    sentence = fails("final_distill", *arguments)
    assert "its projections are not those of --distill_mode layer2layer --distill_layers 0.1,3" in sentence


def test_stage_4_wants_stage_3s_file(fails, teacher, tmp_path):
    sentence = fails("save_final_ckpt", "--config_path", teacher, "--ckpt_after_final_distill", teacher)
    assert "holds no student_model" in sentence
    assert not (tmp_path / "pruned_hubert_base.pth").exists()
