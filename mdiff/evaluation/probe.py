"""Linear and nearest-neighbour probes of features."""

from typing import NamedTuple

from torch import Tensor

from mdiff.errors import DataError

NEIGHBOURS = 20
# Enough for the solver on standardised features; it stops earlier where it has converged.
SOLVER_STEPS = 500


class Probe(NamedTuple):
    """The accuracy on test items of a linear probe, and of the nearest neighbours."""

    linear: float
    neighbours: float


def probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> Probe:
    """The accuracy of labels (N,) int64 predicted from features (N, D), by scikit-learn.

    A logistic regression with its default penalty and the 20 nearest neighbours (fewer where
    there are fewer), both on features standardised by the training set's mean and deviation.

    Raises DataError where shapes do not fit or the training labels are all the same.
    """
    for name, found, labels in (
        ("training", train_features, train_labels), ("test", test_features, test_labels),
    ):  # fmt: skip
        if found.dim() != 2 or labels.shape != found.shape[:1] or not len(found):
            raise DataError(
                f"{name} features {tuple(found.shape)} and labels {tuple(labels.shape)}: "
                "expected (N, D) and (N,)"
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise DataError(
            f"{train_features.shape[1]} training and {test_features.shape[1]} test features: "
            "not one space"
        )
    if len(set(train_labels.tolist())) < 2:
        raise DataError("the training labels are all the same: a probe needs at least two")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_features.numpy())
    learnt = scaler.transform(train_features.numpy())
    unseen = scaler.transform(test_features.numpy())
    known, truth = train_labels.numpy(), test_labels.numpy()
    linear = LogisticRegression(max_iter=SOLVER_STEPS)
    near = KNeighborsClassifier(min(NEIGHBOURS, len(known)))
    return Probe(*(float(kind.fit(learnt, known).score(unseen, truth)) for kind in (linear, near)))
