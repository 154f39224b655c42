"""Arrays in, numbers out: verification, identification and parsing scores."""

from partlocal.evaluation.identification import rank_k, tpir_at_fpir
from partlocal.evaluation.parsing import ParsingScore
from partlocal.evaluation.uncertainty import (
    Interval,
    PairedTest,
    auc_interval,
    paired_accuracy_test,
)
from partlocal.evaluation.verification import (
    FoldAccuracy,
    Roc,
    auc,
    roc,
    tar_at_far,
    ten_fold_accuracy,
)

__all__ = [
    "FoldAccuracy",
    "Interval",
    "PairedTest",
    "ParsingScore",
    "Roc",
    "auc",
    "auc_interval",
    "paired_accuracy_test",
    "rank_k",
    "roc",
    "tar_at_far",
    "ten_fold_accuracy",
    "tpir_at_fpir",
]
