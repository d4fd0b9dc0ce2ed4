"""The classifier of SUPERB's utterance-level tasks: a weighted sum of the layers, and a linear layer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import Tensor

RESAMPLES = 10_000
"""The bootstrap's number of draws."""


def learn(features: Tensor, labels: Tensor, num_labels: int, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Learns from standardised features (layer, recording, feature) the layers' weights, which sum to 1, and
    the weight (label, feature) and bias (label,) of a linear classifier on their weighted sum.

    It minimises c x the sum of the cross-entropies + half the squared norm of what is learned (less the
    bias), as scikit-learn's logistic regression does, by L-BFGS on all recordings at once.
    """
    scores = torch.zeros(features.size(0), requires_grad=True)
    weight = torch.zeros(num_labels, features.size(2), requires_grad=True)
    bias = torch.zeros(num_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores, weight, bias], max_iter=100, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(torch.tensordot(scores.softmax(0), features, 1), weight, bias)
        penalty = (weight.square().sum() + scores.square().sum()) / (2 * c * len(labels))
        loss = F.cross_entropy(logits, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return scores.detach().softmax(0), weight.detach(), bias.detach()


def judge(
    features: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], c: float
) -> tuple[np.ndarray, np.ndarray]:
    """Trains a classifier for each fold, and judges with it the recordings that it was not trained on.

    Args:
        features: (recording, layer, feature).
        labels: (recording,).
        folds: (training indices, indices to judge) of each.
        c: the inverse strength of the penalty.
    Returns:
        For each recording 1 if it was recognised and else 0, and the layers' weights, (fold, layer).
    """
    names, targets = np.unique(labels, return_inverse=True)
    flat = features.reshape(len(features), -1)
    correct = np.zeros(len(labels))
    weights = []
    for train, judged in folds:
        # Standardised, a layer's weight says how much it counts, not how large its values are.
        standard = StandardScaler().fit(flat[train]).transform(flat).reshape(features.shape)
        standard = torch.from_numpy(standard).transpose(0, 1)
        known = standard[:, train].contiguous()
        layers, weight, bias = learn(known, torch.from_numpy(targets[train]), len(names), c)
        guess = F.linear(torch.tensordot(layers, standard[:, judged], 1), weight, bias).argmax(-1)
        correct[judged] = guess.numpy() == targets[judged]
        weights.append(layers.numpy())
    return correct, np.stack(weights)


def interval(values: np.ndarray, clusters: np.ndarray, seed: int) -> tuple[float, float]:
    """Estimates the 95% interval of the mean of ``values``, one for each recording, by the bootstrap
    (percentiles) over whole ``clusters``: each recording's speaker, or the recording itself. With one
    ``seed`` models are compared under the same draws."""
    _, cluster = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(cluster, weights=values), np.bincount(cluster)
    random = np.random.default_rng(seed)
    draws = (random.integers(len(sizes), size=len(sizes)) for _ in range(RESAMPLES))
    low, high = np.percentile([sums[draw].sum() / sizes[draw].sum() for draw in draws], (2.5, 97.5))
    return float(low), float(high)
