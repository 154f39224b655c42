"""Arrays in, numbers out: verification, identification and parsing scores."""

from partlocal.evaluation.identification import (
    Standings,
    rank_k,
    standings,
    tpir_at_fpir,
)
from partlocal.evaluation.parsing import ParsingScore
from partlocal.evaluation.search import Highest, Nearest, score_blocks
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
    tar_above_impostors,
    tar_at_far,
    ten_fold_accuracy,
)

__all__ = [
    "FoldAccuracy",
    "Highest",
    "Interval",
    "Nearest",
    "PairedTest",
    "ParsingScore",
    "Roc",
    "Standings",
    "auc",
    "auc_interval",
    "paired_accuracy_test",
    "rank_k",
    "roc",
    "score_blocks",
    "standings",
    "tar_above_impostors",
    "tar_at_far",
    "ten_fold_accuracy",
    "tpir_at_fpir",
]
