"""Students of a shape that is asked for: their weights, their size, and that every stage takes them."""

import re

import pytest
import torch

from lightning import DistillModule
from reporting.run import Student
from tests.helpers.models import FAMILIES, config_of, ungated, with_absent_branches
from tests.helpers.stages import call, flags
from training.arguments import distillation, training_parser
from utils.checkpoint import load_model, save_checkpoint
from wav2vec2 import wav2vec2_model
from wav2vec2.cost import count_parameters

WAVEFORMS = 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Runs make_student.py on a model, and returns the student."""

    def make(teacher, *size):
        save_checkpoint(tmp_path / "teacher.pth", teacher.eval())
        files = ["--teacher_ckpt", tmp_path / "teacher.pth", "--out", tmp_path / "student.pth"]
        call(monkeypatch, "make_student", *files, *size)
        return load_model(tmp_path / "student.pth").eval()

    return make


def stirred(model):
    """The model with norms and biases that are not those of every new one."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("layers, kept", [("2", [0, 1]), ("2,3", [1, 2])])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_layers_compute_what_they_did(family, layers, kept, make):
    teacher = ungated(family)
    student = make(teacher, "--layers", layers)
    parts = teacher.encoder.transformer
    bias = parts.layers[0].attention.position_bias(12)
    parts.layers = torch.nn.ModuleList(parts.layers[layer] for layer in kept)
    for layer in parts.layers:
        layer.attention.position_bias = lambda frames: bias
    states, expected = (model.extract_features(WAVEFORMS)[0] for model in (student, teacher))
    assert len(states) == 3 and all(map(torch.equal, states, expected))


SHAPES = [
    ("hubert_base", "--intermediate=8", "feed_forward"),
    ("hubert_base", "--intermediate=64,64,40", "layers.2.feed_forward"),
    ("hubert_large", "--conv_channels=12", "feature"),
    ("hubert_base", "--conv_channels=16,16,16,16,16,16,12", "conv_layers.6|dummy|feature_projection"),
    ("hubert_base", "--width=16", "transformer|projection.projection"),
    ("wavlm_base", "--heads=2", "rel_"),
]


@pytest.mark.parametrize("family, size, new", SHAPES)
def test_weights_are_new_where_a_shape_differs(family, size, new, make):
    teacher = stirred(ungated(family))
    student, other = make(teacher, size).state_dict(), make(teacher, size, "--seed=1").state_dict()
    theirs = teacher.state_dict()
    kept = {name for name, tensor in student.items() if torch.equal(tensor, theirs[name])}
    assert kept == {name for name in theirs if not re.search(new, name)}
    assert any(not torch.equal(student[name], other[name]) for name in student)


def test_a_shape_is_what_the_flags_say(make):
    size = ("--layers=3,1", "--width=24", "--heads=3", "--intermediate=8,40", "--conv_channels=12")
    student = make(ungated("wavlm_base"), *size)
    assert student.widths() == {"conv_channels": [12] * 7, "heads": [3, 3], "feed_forward": [8, 40]}
    assert student.config["encoder_embed_dim"] == 24


@pytest.mark.parametrize(
    "family, keep, size", [("hubert_base", "depth", "--width=20"), ("wavlm_base", "width", "--layers=2")]
)
def test_params_come_nearest_to_what_is_asked_for(family, keep, size, make, capsys):
    teacher = ungated(family)
    wanted = make(teacher, size)
    for share in (0.98, 1.02):
        student = make(teacher, f"--params={share * count_parameters(wanted) / 1e6}M", f"--keep={keep}")
        assert student.widths() == wanted.widths() and student.config == wanted.config
    printed = capsys.readouterr().out
    before, after = (f"{count_parameters(model):,}" for model in (teacher, wanted))
    assert re.search(rf"parameters +{before} +{after}\n", printed)
    assert re.search(rf"layer 3 heads +4 +{4 if keep == 'depth' else 0}\n", printed)


def test_a_pruned_wavlm_keeps_its_position_bias(make):
    """Its second layer has no attention, and becomes the first, which makes the bias of the next."""
    teacher = with_absent_branches("wavlm_base")
    student = make(teacher, "--layers=2,3")
    assert student.widths()["heads"] == [0, *teacher.widths()["heads"][2:]]
    name = "encoder.transformer.layers.0.attention.rel_attn_embed.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])


@pytest.mark.parametrize("width, words", [(32, "the head is the teacher's"), (16, "the head is new")])
def test_a_head_keeps_its_size_and_its_vocabulary(width, words, make, capsys, tmp_path):
    (tmp_path / "teacher.vocab.json").write_text('{"<pad>": 0, "a": 1, "b": 2}')
    teacher = ungated("hubert_base", aux_num_out=3)
    student = make(teacher, "--layers=1", f"--width={width}")
    assert student.aux.weight.shape == (3, width) and words in capsys.readouterr().out
    assert width != 32 or torch.equal(student.aux.weight, teacher.aux.weight)
    assert (tmp_path / "student.vocab.json").read_text() == (tmp_path / "teacher.vocab.json").read_text()


MISTAKES = [
    (["--layers=4"], "there is no layer 4"),
    (["--layers=1,0"], "'0' is not a whole number above 0"),
    (["--width=30"], "a width of 30 cannot be divided into 4 heads"),
    (["--heads=3"], "a width of 32 cannot be divided into 3 heads"),
    (["--intermediate=8,8"], "--intermediate has 2 numbers for 3 layers"),
    (["--conv_channels=8,8"], "--conv_channels has 2 numbers for 7 layers"),
    (["--params=20K"], "--params and --keep go together"),
    (["--params=20K", "--keep=depth", "--width=16"], "leave out --width"),
    (["--params=20K", "--keep=width", "--layers=2"], "leave out --layers"),
    (["--params=20", "--keep=width"], "--params 20: --keep width comes no nearer than"),
    (["--params=much", "--keep=width"], "'much' is not a number of parameters, as in 23.6M"),
    (["--width=320000"], "and its teacher has only"),
]


@pytest.mark.parametrize("mistake, words", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, words, fails, teacher, tmp_path):
    out = tmp_path / "student.pth"
    assert words in fails("make_student", "--teacher_ckpt", teacher, "--out", out, *mistake)
    assert not out.exists()


def test_a_teacher_with_gates_is_refused(fails, tmp_path):
    save_checkpoint(tmp_path / "gated.pth", wav2vec2_model(**config_of("hubert_base")))
    arguments = ["--teacher_ckpt", tmp_path / "gated.pth", "--out", tmp_path / "student.pth"]
    assert "gated.pth: has gates" in fails("make_student", *arguments)


def module(teacher, student, *arguments):
    """The module that final_distill.py trains, with the cosine alone."""
    args = training_parser("", 1e-3, 1, 2).parse_args(["--l1_weight=0", *arguments])
    return DistillModule(**distillation(args, teacher, student), use_reg=False).eval()


def loss(module):
    with torch.no_grad():
        return module.distill_loss(*module(WAVEFORMS))[0].item()


def test_a_student_of_two_layers_reaches_their_targets(make):
    """The teacher's second layer does nothing, so that a student without it can equal the third."""
    branches = {key: [True, False, True] for key in ("encoder_use_attention", "encoder_use_feed_forward")}
    teacher = stirred(ungated("hubert_large", **branches))
    student = make(teacher, "--layers=1,3")
    right = module(teacher, student, "--distill_layers=0.1,3", "--student_layers=0.1,2")
    assert loss(right) == pytest.approx(-1, abs=1e-6)
    for layers in ("0.2,1", "1.1,2", "0.1,1"):
        assert loss(module(teacher, student, "--distill_layers=0.1,3", f"--student_layers={layers}")) > -0.999
    # The report projects what training projects.
    trained = Student(student, "", "", right.distill_linear_projs.state_dict(), dict(right.hparams))
    projected = trained.project(student.extract_features(WAVEFORMS)[0])
    torch.testing.assert_close(torch.stack([*projected.values()], dim=1), right(WAVEFORMS)[0])


def test_without_gelu_predlayer_reaches_negative_values(make):
    teacher = ungated("hubert_base")
    student = make(teacher, "--layers=1")
    mode = ["--distill_mode=predlayer", "--distill_layers=2,3"]
    for ends, lowest in (("gelu", -0.18), ("none", -100)):
        predicting = module(teacher, student, *mode, f"--predlayer_activation={ends}")
        for parameter in predicting.distill_linear_projs.parameters():
            parameter.data.mul_(10)
        predicted = predicting(WAVEFORMS)[0]
        assert lowest < predicted.min() and (predicted.min() < -1) == (ends == "none")
        heads = predicting.distill_linear_projs.state_dict()
        projected = Student(student, "", "", heads, dict(predicting.hparams)).project(
            student.extract_features(WAVEFORMS)[0]
        )
        torch.testing.assert_close(torch.stack([*projected.values()], dim=1), predicted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hubert_base", "wavlm_base"])
def test_every_stage_takes_a_student_of_another_shape(
    family, make, manifests, monkeypatch, capsys, fails, tmp_path
):
    """It trains, is saved, gets gates and is pruned; stage 3 goes on with the projections of stage 1."""
    size = ("--layers=2,3", "--width=24", "--intermediate=40,48", "--conv_channels=12")
    teacher = ungated(family)
    make(teacher, *size)
    files = {"teacher_ckpt": tmp_path / "teacher.pth", "student_ckpt": tmp_path / "student.pth"}

    def arguments(name, **changes):
        given = {"max_updates": 2, "num_workers": 0, "student_layers": "0.1,2", "distill_layers": "0.2,3"}
        given |= {"sparsity_warmup_updates": None} if "final" in name else {"target_sparsity": 0.9}
        return flags(manifests, "", tmp_path / name, **{**given, **files, **changes})

    unfit = arguments("final", student_layers=None)
    assert "the student has 2 layers and the teacher 3" in fails("final_distill", *unfit)
    call(monkeypatch, "final_distill", *arguments("final"))
    assert "student.pth: holds no projections" in capsys.readouterr().err
    last = tmp_path / "final" / "ckpts" / "last.ckpt"
    saved = ["--config_path", files["student_ckpt"], "--ckpt_after_final_distill", last]
    call(monkeypatch, "save_final_ckpt", *saved, "--out", tmp_path / "saved.pth")
    assert load_model(tmp_path / "saved.pth").widths()["feed_forward"] == [40, 48]

    files["student_ckpt"] = tmp_path / "saved.pth"
    call(monkeypatch, "distill", *arguments("gated"))
    pruned, last = tmp_path / "gated" / "ckpts" / "pruned.pth", tmp_path / "gated" / "ckpts" / "last.ckpt"
    cut = ["--distilled_ckpt", last, "--original_ckpt", files["student_ckpt"], "--target_sparsity=0.9"]
    call(monkeypatch, "prune", *cut, "--out", pruned)
    assert count_parameters(load_model(pruned)) <= 0.1 * count_parameters(teacher), "of the teacher's size"
    files["student_ckpt"] = pruned
    assert "student_layers was 0.1,2" in fails("final_distill", *arguments("final 2", student_layers="0.2,1"))
    capsys.readouterr()
    call(monkeypatch, "final_distill", *arguments("final 2"))
    assert "holds no projections" not in capsys.readouterr().err
