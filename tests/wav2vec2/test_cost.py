"""What a model costs: by polynomial, by counting what was cut, and by torch's own counter of FLOP."""

import copy
import operator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import FAMILIES, config_of, pruned, randomly_gated, ungated
from wav2vec2 import PruningError, prune_to, wav2vec2_model
from wav2vec2.cost import COUNTS, count_parameters, mac_count, multiply_accumulates
from wav2vec2.pruning import rounding

SECONDS = 0.7


def measured_macs(model, seconds):
    """By torch's counter, on the CPU, of the ungated ``model``."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(torch.zeros(1, int(16_000 * seconds)))
    return counter.get_total_flops() / 2


def true_cost(model, kind):
    return count_parameters(model) if kind == "params" else measured_macs(model, 10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [ungated, pruned])
def test_macs_are_those_of_torchs_counter(family, kind):
    model = kind(family)
    assert mac_count(model, SECONDS).total() == measured_macs(model, SECONDS)
    assert multiply_accumulates(model, SECONDS) == pytest.approx(measured_macs(model, SECONDS) / SECONDS)


def test_macs_of_an_output_layer_count():
    model = wav2vec2_model(**config_of("hubert_base", aux_num_out=7))
    model.eval().prune()
    assert mac_count(model, SECONDS).total() == measured_macs(model, SECONDS)


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_pruning_leaves_is_known_before(family, seed, kind):
    model = randomly_gated(family, seed).eval()
    if seed == 3:
        for layer in model.encoder.transformer.layers:
            layer.attention.hard_concrete_for_heads.log_alpha.data.fill_(-40.0)
    expected = model.count(kind).after_pruning({gate: gate.n_open() for gate in model.gates()})
    model.prune()
    assert true_cost(model, kind) == expected


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_of_decided_gates_is_the_true_one(family, kind):
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of(family)).eval()
    for gate in model.gates():
        gate.log_alpha.data.fill_(40.0)
    count = COUNTS[kind](model)
    assert count().item() == pytest.approx(count.total(), abs=1e-3)
    for gate in model.gates():
        gate.log_alpha.data = torch.where(torch.rand(gate.n_in) < 0.5, -40.0, 40.0)
        gate.log_alpha.data[0] = 40.0
    expected = count().item()
    count().backward()
    assert all(gate.log_alpha.grad is not None for gate in model.gates())
    model.prune()
    assert true_cost(model, kind) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind, round_to", [("params", 1), ("params", 8), ("macs", 1), ("macs", 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_is_filled_to_the_last_feature_that_fits(family, kind, round_to):
    model = randomly_gated(family, 5, closed=0.5, ff_interm_features=256).eval()
    for gate in model.gates():
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(40.0)
    count, in_order = model.count(kind), copy.deepcopy(model)
    budget = 0.45 * count.total()
    reached = prune_to(model, 0.55, kind, round_to=round_to)
    cost = true_cost(model, kind)
    assert reached == pytest.approx(1 - cost / count.total(), abs=1e-12)
    feature = 2 * 32 + 1 if kind == "params" else 2 * 32 * 499
    assert 0 <= budget - cost < round_to * feature
    if round_to == 8:
        assert all(channels % 8 == 0 for channels, *_ in model.config["extractor_conv_layer_config"])
    # All that one number added to every gate leaves within the size is kept, and something more.
    count = in_order.count(kind)
    for offset in torch.arange(8, -8, -0.01).tolist():
        n_open = {gate: gate.n_open(n, offset) for gate, n in rounding(count.layout, round_to).items()}
        if count.after_pruning(n_open) <= budget:
            break
    in_order.prune(masks={gate: gate.evaluation_mask(n) for gate, n in n_open.items()})
    assert in_order.count(kind).total() <= cost
    for name, widths in in_order.widths().items():
        assert all(map(operator.le, widths, model.widths()[name]))


def test_a_budget_below_what_must_stay_is_refused():
    model = randomly_gated("hubert_base", 5).eval()
    before = [gate.log_alpha.clone() for gate in model.gates()]
    with pytest.raises(PruningError, match="above the budget"):
        prune_to(model, 0.999)
    assert all(map(torch.equal, before, (gate.log_alpha for gate in model.gates())))
