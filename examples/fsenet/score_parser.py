"""Score a parser on parsing sets.

    python examples/fsenet/score_parser.py runs/parser-0/parsing_net.safetensors \
        --score fasseg256.zip:fasseg:frontal02-test LaPa:lapa:val

prints JSON: F1 of each label from one confusion matrix over the whole set, their mean without
background, the F1 of groups ("inner" is Helen's overall), the mean IoU. Without a file it scores
the parser that partlocal ships. Choose between parsers by a validation split; test once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from data.parsing_alignment import aligned_pairs
from data.parsing_layouts import open_parsing_set
from data.parsing_sets import ParsingSet
from limits import check_numbers
from machine import finite, to_json
from parsing_loss import IGNORE
from run_folder import one_line_errors
from torch import Tensor
from torch.nn import functional as F
from workplace import Workplace, this_process

from partlocal import ParsingNet
from partlocal.evaluation.parsing import ParsingScore
from partlocal.parsing import PRETRAINED

CHUNK = 64  # pictures at a time


@dataclass(frozen=True)
class Arguments:
    """Score a parser.

    Args:
        parser: the `.safetensors` that `train_parser.py` wrote; by default the shipped parser.
        score: sets, `PATH:KIND:SPLITS` each.
        damaged: how many pictures of a set may be damaged; each is named and left out.
        precision: `fp32`, or `bf16` autocast; `auto` takes bf16 where the machine computes in it.
    """

    parser: Annotated[Path | None, tyro.conf.Positional] = None
    score: tuple[str, ...] = ()
    damaged: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def open_parser(path: Path | None) -> ParsingNet:
    """Load the parser of a file, or the shipped one.

    Raises:
        FileNotFoundError, ValueError: it is no such file, or see `ParsingNet.load_compact`.
    """
    if path is None:
        return ParsingNet.pretrained()
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(
            f"{path} is no parser: pass the {PRETRAINED.name} that train_parser.py wrote, with its "
            ".json beside it, or no file for the parser that ships"
        )
    return ParsingNet.load_compact(path)


def open_sets(choices: Sequence[str]) -> dict[str, ParsingSet]:
    """Open the sets to score on, each under what results call it.

    Args:
        choices: `PATH:KIND:SPLITS` each.

    Raises:
        FileNotFoundError, ValueError: see `open_parsing_set`; or two would be called alike.
    """
    found: dict[str, ParsingSet] = {}
    for pairs in map(open_parsing_set, choices):
        if pairs.title in found:
            raise ValueError(f"--score names two sets {pairs.title}: rename the file of one")
        found[pairs.title] = pairs
    return found


@torch.inference_mode()
def predict_labels(parser: ParsingNet, images: Tensor, place: Workplace) -> np.ndarray:
    """Return the most probable label of each pixel of a batch, uint8, at the pictures' own size."""
    with place.autocast():
        logits = parser(images.to(place.device)).float()
    logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", antialias=True)
    return logits.argmax(1).to(torch.uint8).cpu().numpy()


def score_parser(
    parser: ParsingNet, images: Tensor, labels: Tensor, place: Workplace
) -> dict[str, Any]:
    """Score the parser on drawn faces that it was not trained on."""
    score = ParsingScore(parser.labels)
    for some, true in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        score.update(predict_labels(parser, some, place), true.numpy())
    return {
        "macro_f1": float(np.nanmean(list(score.f1.values()))),
        "mean_f1": score.mean_f1,
        "helen_overall_f1": score.overall_f1,
        "miou": score.mean_iou,
        "f1": score.f1,
    }


def score_parsing_set(
    parser: ParsingNet, pairs: ParsingSet, place: Workplace, damaged: int = 0
) -> dict[str, Any]:
    """Score the parser on a set, in the set's own labels.

    Labels that the parser takes for one, as the two lips for FASSEG's mouth, are merged. Labels
    that it does not know, as hats, count as what it should say there, background; they never
    occur then, have no F1, and are in no mean. Where the set has probabilities, the most probable
    label is the true one.
    """
    aligned, own = aligned_pairs(pairs, damaged=damaged), pairs.vocabulary
    score = ParsingScore(own.labels)
    merge = own.merge(parser.labels)
    for some, target in zip(aligned.images.split(CHUNK), aligned.targets.split(CHUNK), strict=True):
        true = own.fold(_most_probable(target), parser.labels).numpy()
        score.update(predict_labels(parser, some, place), true, IGNORE, merge)
    groups = own.labels.groups
    return {
        "split": ", ".join(pairs.splits),
        "pictures": len(aligned.names),
        "skipped": len(aligned.skipped),
        "damaged": len(aligned.lost),
        "f1": {name: f1 for name, f1 in score.f1.items() if not np.isnan(f1)},
        "groups": {name: score.merged_f1(name) for name in groups},
        "mean_f1": score.mean_f1,
        "miou": score.mean_iou,
    }


def _most_probable(target: Tensor) -> Tensor:
    """Return labels, of probabilities too; where nothing has one, the pixel does not count."""
    if target.ndim == 3:
        return target
    return torch.where(target.amax(1) > 0, target.argmax(1), IGNORE).to(torch.uint8)


def main(arguments: Arguments) -> None:
    """Score on each set, and print."""
    sets = open_sets(arguments.score)
    if not sets:
        raise ValueError("--score names no set: expected PATH:KIND:SPLITS")
    parser = open_parser(arguments.parser)
    place = this_process(arguments.precision)
    parser.freeze().to(place.device)
    scores = {
        title: score_parsing_set(parser, pairs, place, arguments.damaged)
        for title, pairs in sets.items()
    }
    print(to_json(finite({"precision": place.precision, "scores": scores})))


if __name__ == "__main__":
    with one_line_errors():
        chosen = tyro.cli(Arguments)
        check_numbers(chosen)
        main(chosen)
