"""Weights cast and joined for mixed precision, and the compiled step, against the plain computation."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lightning import DistillLoss, DistillModule, distill_projections
from tests.helpers.models import FAMILIES, config_of, randomly_gated, ungated
from training import trainer
from training.half_precision import Cast, cast_frozen_weights
from wav2vec2 import wav2vec2_model
from wav2vec2.gating import draw, open_units


def states_and_gradients(model, layers, skip):
    """Of a pass in float64, the weights of ``layers`` layers being narrowed together."""
    model = copy.deepcopy(model).double()
    torch.manual_seed(3)
    masks = draw(model.gates(), model.log_alpha())
    layout = model._layout
    opened = open_units(layout.axes, masks, 8) if skip else dict.fromkeys(layout.axes)
    weights = layout.narrow(opened, masks, layers)
    waveforms = torch.randn(2, 4000, dtype=torch.float64)
    states, _ = model.extract_features(waveforms, weights=weights)
    sum(state.sin().sum() for state in states).backward()
    return states, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, weights


@pytest.mark.parametrize("skip", [True, False], ids=["open units alone", "all units"])
@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_narrowed_together_are_narrowed_as_each_alone(family, layers, skip):
    model = randomly_gated(family, 1)
    expected, gradients, alone = states_and_gradients(model, 0, skip)
    states, found, together = states_and_gradients(model, layers, skip)
    assert len(together) < len(alone) or not skip
    assert_close(states, expected, rtol=1e-12, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_queries_keys_and_values_are_narrowed_into_one():
    model = randomly_gated("hubert_base", 0)
    attention = model.encoder.transformer.layers[1].attention
    _, _, weights = states_and_gradients(model, 12, True)
    joined = {name for module, name in weights if module.__class__ is attention.__class__}
    assert joined == {"in_proj_weight", "in_proj_bias"}
    for name in ("weight", "bias"):
        assert getattr(attention, f"in_proj_{name}") is None


def test_a_cast_joins_and_its_gradient_comes_apart():
    tensors = [torch.randn(n, 3, requires_grad=True) for n in (2, 1, 4, 5)]
    joined, single = Cast.apply(torch.bfloat16, [3, 1], *tensors)
    assert joined.dtype == single.dtype == torch.bfloat16
    assert_close(joined, torch.cat([t.detach() for t in tensors[:3]]).bfloat16(), rtol=0, atol=0)
    assert_close(single, tensors[3].detach().bfloat16(), rtol=0, atol=0)
    weight = torch.arange(21.0).view(7, 3)
    (joined.float() * weight).sum().backward()
    assert_close([t.grad for t in tensors[:3]], list(weight.split([2, 1, 4])), rtol=0, atol=0)
    assert tensors[3].grad is None, "what took no part has no gradient"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_held_in_half_computes_what_autocast_does(family):
    plain = ungated(family).eval()
    held = copy.deepcopy(plain)
    cast_frozen_weights(held, torch.bfloat16)
    attention = held.encoder.transformer.layers[0].attention
    assert attention.in_proj_weight.dtype == torch.bfloat16 and attention.q_proj.weight is None
    waveforms, lengths = torch.randn(2, 4000), torch.tensor([4000, 3100])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, _ = plain.extract_features(waveforms, lengths)
        states, _ = held.extract_features(waveforms, lengths)
    for state, right in zip(states, expected, strict=True):
        assert (state - right).norm() < 5e-3 * right.norm()


def test_the_teacher_stays_as_it_is_held_while_the_student_trains():
    module = distillation("hubert_base", randomly_gated("hubert_base", 0))
    cast_frozen_weights(module.teacher_model, torch.bfloat16)
    folded = module.teacher_model.encoder.transformer.pos_conv_embed.conv.folded_weight
    module.eval().train()
    assert module.student_model.training and not module.teacher_model.training
    assert module.teacher_model.encoder.transformer.pos_conv_embed.conv.folded_weight is folded


def distillation(family, student):
    dim = student.config["encoder_embed_dim"]
    return DistillModule(
        teacher_model=ungated(family),
        student_model=student,
        distill_mode="layer2layer",
        distill_layers=[0, 1, 3],
        distill_linear_projs=distill_projections("layer2layer", [[0], [1, 3]], dim, dim),
        distill_loss=DistillLoss(0, 1, 1, "raw"),
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup_updates=1,
        max_updates=4,
        use_reg=True,
        reg_learning_rate=1e-2,
        target_sparsity=0.5,
        sparsity_warmup_updates=2,
    )


def test_a_compiled_update_is_the_plain_one_at_every_width(monkeypatch):
    torch._dynamo.reset()
    config = config_of("hubert_base")
    module = distillation("hubert_base", wav2vec2_model(**config))
    plain = copy.deepcopy(module)
    trainer.compile_models(module)
    graphs = []
    for share, length in [(1.0, 4000), (0.5, 4400), (0.1, 5000), (0.8, 6300), (0.3, 5200), (0.6, 7000)]:
        torch.manual_seed(int(100 * share))
        for gate, other in zip(module.student_model.gates(), plain.student_model.gates(), strict=True):
            gate.log_alpha.data = torch.where(torch.rand(gate.n_in) < share, 4.0, -6.0)
            other.log_alpha.data.copy_(gate.log_alpha)
        losses, waveforms = [], torch.randn(2, length)
        for each in (module, plain):
            torch.manual_seed(1)
            each.zero_grad()
            losses.append(each._losses(waveforms, None)["loss"])
            losses[-1].backward()
        assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4, msg=name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2], f"it goes on compiling: {graphs}"
