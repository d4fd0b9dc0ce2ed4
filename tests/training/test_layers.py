"""The compiled step against the plain one, and the teacher that stays as it is held."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import config_of, randomly_gated
from tests.helpers.stages import distill_module
from training.gpu_weights import cast_frozen_weights
from training.layers import checkpoint_activations, compile_layers
from wav2vec2 import wav2vec2_model


def test_a_cast_teacher_stays_as_it_is_in_training():
    module = distill_module("hubert_base", randomly_gated("hubert_base", 0))
    cast_frozen_weights(module.teacher_model, torch.bfloat16)
    folded = module.teacher_model.encoder.transformer.pos_conv_embed.conv.folded_weight
    module.eval().train()
    assert module.student_model.training and not module.teacher_model.training
    assert module.teacher_model.encoder.transformer.pos_conv_embed.conv.folded_weight is folded


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_update_is_the_plain_one(checkpointed):
    torch._dynamo.reset()
    config = config_of("hubert_base")
    module = distill_module("hubert_base", wav2vec2_model(**config))
    plain = copy.deepcopy(module)
    if checkpointed:
        checkpoint_activations(module.student_model)
    compile_layers(module)
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
