"""skorch: in a scikit-learn Pipeline, searched over and scored by AP.

python examples/skorch_grid.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetBinaryClassifier
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss


class Mix(MixedLoss):
    """The mix, with a constructor of numbers alone.

    So that a search can set them, and so that every fit builds the loss anew: a loss that is
    passed as an object would carry its queue and its schedule from one fit into the next.
    """

    def __init__(self, main_weight: float = 0.5, temperature: float = 0.1) -> None:
        ranking = SmoothAPLoss(1, 64, temperature=temperature, temperature_unit="spread")
        super().__init__(CrossEntropy(1), ranking, main_weight=main_weight)


class RankingNet(NeuralNetBinaryClassifier):
    """A binary classifier that is scored by its logits."""

    def get_loss(self, y_pred: Tensor, y_true: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.criterion_(y_pred.unsqueeze(1), y_true)  # skorch makes [n, 1] into [n]

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        # scikit-learn prefers this to predict_proba, which rounds high logits up to ties.
        return self.forward(X).numpy()


class Network(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def search(
    criterion: type[nn.Module], grid: dict[str, list[float]], **settings: int
) -> GridSearchCV:
    net = RankingNet(
        Network,
        criterion=criterion,
        optimizer=torch.optim.AdamW,
        max_epochs=30,
        batch_size=64,
        iterator_train__shuffle=True,
        train_split=None,  # the search has validation rows of its own
        predict_nonlinearity=probabilities,
        verbose=0,
        **settings,
    )
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    return GridSearchCV(
        make_pipeline(StandardScaler(), net), grid, scoring="average_precision", cv=folds
    )


def probabilities(logits: Tensor) -> Tensor:
    """[n, 2], for predict and predict_proba: skorch knows what to do for its own losses only."""
    positive = logits.sigmoid()
    return torch.stack((1 - positive, positive), dim=1)


def rare_tumours() -> tuple[np.ndarray, ...]:
    """Features [n, 30] and labels [n] of train and test: 10 % malignant, as others are left out."""
    features, is_benign = load_breast_cancer(return_X_y=True)
    malignant, benign = np.flatnonzero(is_benign == 0), np.flatnonzero(is_benign == 1)
    rows = np.concatenate((malignant[:40], benign))
    features, labels = features[rows].astype(np.float32), 1 - is_benign[rows]
    return train_test_split(features, labels, stratify=labels, random_state=0)


def main() -> None:
    features, test_features, labels, test_labels = rare_tumours()
    rates = {"rankingnet__lr": [3e-3, 1e-2]}
    mix = {"rankingnet__criterion__main_weight": [0.5, 0.9]}
    searches = {
        "SmoothAP + BCE": search(Mix, {**rates, **mix}),
        "BCE": search(CrossEntropy, rates, criterion__num_classes=1),
    }
    for name, found in searches.items():
        torch.manual_seed(0)
        found.fit(features, labels)
        ap = average_precision_score(test_labels, found.decision_function(test_features))
        print(f"skorch_grid: {name}: test AP {ap:.3f}, with {found.best_params_}")
        assert ap > 0.7  # 10 % are positive
        assert found.score(test_features, test_labels) == ap
        assert found.predict_proba(test_features).shape == (len(test_labels), 2)


if __name__ == "__main__":
    main()
