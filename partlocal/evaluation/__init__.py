"""Arrays in, numbers out: verification, identification and parsing scores."""

from partlocal.evaluation.verification import (
    FoldAccuracy,
    Interval,
    PairedTest,
    Roc,
    auc,
    auc_interval,
    paired_accuracy_test,
    roc,
    tar_at_far,
    ten_fold_accuracy,
)

__all__ = [
    "FoldAccuracy",
    "Interval",
    "PairedTest",
    "Roc",
    "auc",
    "auc_interval",
    "paired_accuracy_test",
    "roc",
    "tar_at_far",
    "ten_fold_accuracy",
]
