"""The size constraint in loops that are not this project's, with any loss."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import AutoModelForCTC

from exports import huggingface
from lightning import DistillLoss, LinearDecayLRScheduler, distill_projections
from tests.helpers.models import recorded, ungated
from tests.helpers.stages import ROOT
from wav2vec2 import SizeConstraint, prune_to, wav2vec2_model

UNITS = "conv,head,interm"


def gated(family="hubert_base", units=UNITS):
    torch.manual_seed(0)
    model = ungated(family)
    model.add_gates(units)
    return model.train()


@pytest.mark.parametrize("name", ["trajectory_hubert", "trajectory_wavlm"])
def test_a_plain_loop_of_thirty_updates_equals_the_recording(name, monkeypatch):
    golden = recorded(name)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(golden["gate_noise"]))
    settings, groups = golden["hyper_parameters"], golden["distill_layer_groups"]
    teacher = wav2vec2_model(**golden["config"]).double().eval()
    teacher.load_state_dict(golden["teacher_state_dict"])
    student = wav2vec2_model(**golden["student_config"]).double()
    student.load_state_dict(golden["student_state_dict"])
    dim = golden["config"]["encoder_embed_dim"]
    projections = distill_projections("layer2layer", groups, dim, dim).double()
    loss_of, layers = DistillLoss(**golden["loss"]), settings["distill_layers"]
    constraint = SizeConstraint(
        student,
        settings["target_sparsity"],
        settings["sparsity_warmup_updates"],
        total=teacher.count().total(),
    ).double()
    optimizer = torch.optim.AdamW(
        constraint.parameter_groups(
            settings["learning_rate"], settings["reg_learning_rate"], projections.parameters()
        ),
        weight_decay=settings["weight_decay"],
    )
    scheduler = LinearDecayLRScheduler(optimizer, settings["warmup_updates"], settings["max_updates"])
    clipped = [*student.parameters(), *projections.parameters(), *constraint.parameters()]
    for update, batch in enumerate(golden["batches"]):
        with torch.no_grad():
            taught = teacher.extract_features(batch.double())[0]
        learnt = student.extract_features(batch.double())[0]
        projected = [linear(learnt[layer]) for linear, layer in zip(projections, layers, strict=True)]
        loss, _ = loss_of(torch.stack(projected, 1), torch.stack([taught[layer] for layer in layers], 1))
        expected = golden["log"][update]
        assert constraint.sparsity.item() == pytest.approx(expected["sparsity_expected"], rel=1e-9)
        assert constraint.target(update) == pytest.approx(expected["sparsity_target"], rel=1e-9)
        total = loss + constraint(update)
        assert total.item() == pytest.approx(expected["train_loss"], rel=1e-9)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(clipped, golden["clip_norm"])
        optimizer.step()
        scheduler.step()
    final = student.state_dict()
    for key, expected in golden["final_student_state_dict"].items():
        assert (final[key] - expected).abs().max() < 1e-9, key


def test_the_state_is_the_multipliers_and_gates_load_again(tmp_path):
    model = gated("wavlm_base")
    constraint = SizeConstraint(model, 0.5, 10)
    train(model, constraint, nn.Linear(32, 5), updates=3)
    torch.save([model.config, model.state_dict(), constraint.state_dict()], tmp_path / "state.pt")
    config, state, multipliers = torch.load(tmp_path / "state.pt", weights_only=True)
    assert multipliers.keys() == {"lambda1", "lambda2"} and multipliers["lambda1"] != 0
    loaded = wav2vec2_model(**config)
    loaded.load_state_dict(state)
    again = SizeConstraint(loaded, 0.5, 10)
    again.load_state_dict(multipliers)
    assert loaded.is_gated and torch.equal(again(3), constraint(3))


def gradients(model, constraint, head, parts, autocast=False, scaler=None):
    """Of the weights, the gates and the multipliers, with the batch in ``parts``."""
    torch.manual_seed(1)
    waveforms, labels = task()
    parameters = [
        p for group in constraint.parameter_groups(1, 1, head.parameters()) for p in group["params"]
    ]
    for x, y in zip(waveforms.chunk(parts), labels.chunk(parts), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (cross_entropy(head, model, x, y) + constraint(50)) / parts
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer := torch.optim.SGD(parameters))
        scaler.step(optimizer)
        scaler.update()
    return [p.grad.clone() for p in parameters]


@pytest.mark.parametrize("how, close", [("accumulate", 1e-5), ("scale", 1e-5), ("autocast", 0.1)])
def test_gradients_are_the_same_in_every_kind_of_loop(how, close, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(0.5))
    model, head = gated(), nn.Linear(32, 5)
    constraint = SizeConstraint(model, 0.5, 100)
    nn.init.ones_(constraint.lambda1), nn.init.ones_(constraint.lambda2)
    plain = gradients(model, constraint, head, 1)
    for module in (model, head, constraint):
        module.zero_grad()
    scaler = torch.amp.GradScaler("cpu") if how == "scale" else None
    other = gradients(model, constraint, head, 2 if how == "accumulate" else 1, how == "autocast", scaler)
    flat, expected = (torch.cat([gradient.flatten() for gradient in found]) for found in (other, plain))
    assert (flat - expected).norm() < close * expected.norm()
    for gradient, wanted in zip(other[-2:], plain[-2:], strict=True):  # of the multipliers
        assert gradient.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted != 0


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: SizeConstraint(ungated("hubert_base"), 0.5), "no gates: add_gates"),
        (lambda: SizeConstraint(gated(), 1.0), "target_sparsity is from 0 to below 1, not 1.0"),
        (lambda: SizeConstraint(gated(), 0.5, of="flops"), "of is one of params, macs, not 'flops'"),
        (lambda: gated().add_gates("head"), "has gates already: prune"),
        (lambda: prune_to(gated(), 0.5, of="flops"), "of is one of params, macs"),
        (lambda: prune_to(ungated("hubert_base"), 0.5), "pruning must leave .* above the budget"),
    ],
)
def test_a_mistake_is_one_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake()


@pytest.mark.parametrize("of", ["params", "macs"])
def test_a_pruned_model_gets_gates_again_and_counts_by_the_first(of):
    model = gated()
    whole = SizeConstraint(model, 0.5, of=of).total
    prune_to(model, 0.5, of)
    model.add_gates("head,interm")
    first, own = SizeConstraint(model, 0.5, of=of, total=whole), SizeConstraint(model, 0.5, of=of)
    assert own.total <= 0.5 * whole
    assert 1 - first.sparsity.item() == pytest.approx((1 - own.sparsity.item()) * own.total / whole, rel=1e-4)
    assert 0.4 <= prune_to(model, 0.4, of) < 0.5


def task():
    return torch.randn(2, 2000), torch.randint(1, 5, (2, 6))


def cross_entropy(head, model, waveforms, labels):
    return nn.functional.cross_entropy(head(model(waveforms)[0]).transpose(1, 2), labels)


def train(model, constraint, head, updates):
    """A plain loop on a toy task, which it learns by heart; returns the last loss. Its learning rates rise
    over 20 updates and fall over the last half."""
    optimizer = torch.optim.AdamW(constraint.parameter_groups(1e-3, 0.1, head.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 20, 2 * (updates - k) / updates)
    )
    waveforms, labels = task()
    for update in range(updates):
        loss = cross_entropy(head, model, waveforms, labels)
        optimizer.zero_grad()
        (loss + constraint(update)).backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("family, of", [("hubert_base", "params"), ("wavlm_large", "macs")])
def test_a_plain_loop_reaches_its_target_while_it_learns(family, of):
    model, head = gated(family), nn.Linear(32, 5)
    constraint = SizeConstraint(model, 0.5, 150, of)
    assert train(model, constraint, head, 400) < 0.1
    assert constraint.sparsity.item() == pytest.approx(0.5, abs=0.01)
    assert 0.5 <= prune_to(model, 0.5, of) < 0.51


@pytest.mark.slow
def test_the_loops_of_the_page_reach_their_target(tmp_path, monkeypatch):
    """Plain, Lightning and transformers, as docs/own-loss.md has them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    huggingface.export(ungated("hubert_base").eval(), tmp_path / "OUT", {})
    waveforms, labels = task()
    inputs = {"input_values": waveforms, "labels": labels[:, :2]}
    names = {
        "updates": 400,
        "task_loss": lambda output, labels: nn.functional.cross_entropy(output.transpose(1, 2), labels),
        "OUT": tmp_path / "OUT",
        "loader": torch.utils.data.DataLoader([(waveforms, labels)] * 400, batch_size=None),
        "dataset": [0] * 8,
        "collate": lambda items: inputs,
    }
    blocks = re.findall("```python\n(.*?)```", (ROOT / "docs" / "own-loss.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names |= {"model": ungated("hubert_base"), "head": nn.Linear(32, 5)}
        exec(block, names)
        constraint = names["module"].constraint if "pl.Trainer" in block else names["constraint"]
        assert constraint.sparsity.item() == pytest.approx(0.5, abs=0.02)
        pruned = getattr(names["model"], "pruned_speech", names["model"])
        assert not pruned.is_gated
        assert pruned.count().total() == pytest.approx(0.5 * constraint.total, rel=0.01)


def rank(number, folder):
    """One of two processes under DDP, with data and dropout of its own."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=2)
    model, head = gated(units="conv,head,interm,attlayer,ffnlayer"), nn.Linear(32, 5)
    constraint = SizeConstraint(model, 0.5, 10)
    torch.manual_seed(number)
    train(
        nn.parallel.DistributedDataParallel(model), constraint, nn.parallel.DistributedDataParallel(head), 5
    )
    torch.save([model.state_dict(), constraint.state_dict()], f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_stay_alike_under_ddp(tmp_path):
    mp.spawn(rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    for mine, other in zip(first, second, strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name


def load(folder):
    return AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)


def test_a_gated_export_that_was_saved_loads_again(tmp_path):
    torch.manual_seed(0)
    huggingface.export(ungated("wavlm_large").eval(), tmp_path / "OUT", {})
    model, waveforms = load(tmp_path / "OUT"), torch.randn(2, 4000)

    @torch.no_grad()
    def logits(model):
        return model.eval()(waveforms).logits

    whole, size = logits(model), model.pruned_speech.count().total()
    model.pruned_speech.add_gates(UNITS)
    constraint, gates = SizeConstraint(model.pruned_speech, 0.5), model.pruned_speech.gates()
    for gate in gates:
        nn.init.normal_(gate.log_alpha, 0.0, 3.0)
    nn.init.ones_(constraint.lambda1)
    (model.train()(waveforms).logits.square().mean() + constraint(0)).backward()
    assert all(gate.log_alpha.grad.norm() > 0 for gate in gates)
    assert not torch.allclose(logits(model), whole, rtol=0.1)
    model.save_pretrained(tmp_path / "gated")
    loaded = load(tmp_path / "gated")
    assert loaded.pruned_speech.is_gated and torch.equal(logits(loaded), logits(model))
    reached = prune_to(loaded.pruned_speech, 0.5)
    assert 0.5 <= reached < 0.51
    loaded.save_pretrained(tmp_path / "pruned")
    small = load(tmp_path / "pruned")
    assert not small.pruned_speech.is_gated and torch.equal(logits(small), logits(loaded))
    assert small.pruned_speech.count().total() == pytest.approx((1 - reached) * size)
