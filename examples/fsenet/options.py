"""The options of `train.py`, and the profiles that set many of them at once."""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from data.augment import Augmentation
from describe import TestTime
from train_parser import ParserOptions


def small_parser() -> ParserOptions:
    """Return a parser that two CPU cores train in two minutes."""
    mild = Augmentation(shift=0.02, scale=0.05, rotation=4, brightness=0.2, contrast=0.2, grey=0.1)
    return ParserOptions(width=32, num_stacks=1, steps=1000, augmentation=mild)


@dataclass(frozen=True)
class Options:
    """Train FSENet and a global-only network alike, and compare them.

    Args:
        profile: which defaults the other options have: `default` (drawn faces, minutes on two
            CPU cores), `lfw` (real faces, under an hour there), `paper` (FSENet's, for GPUs).
        output: the run's folder; by default the next free `runs/<profile>-<number>`.
        resume: go on with `output`, or with the newest run of the profile.
        seed: of everything that is random.
        faces: pictures of people, in one or several of the formats of docs/data.md; by default
            faces are drawn.
        min_images: people of `--faces` with fewer pictures do not train.
        damaged: how many pictures of `--faces` may be damaged, in each process; one more ends the
            run.
        parsing: a folder or zip of `images/` and `labels/` on which the parser is scored too.
        parser: `train` it first, or take the `pretrained` one that partlocal ships.
        parser_options: how the parser is built and trained.
        identities: drawn people to train on; with `--faces` the parser alone trains on them.
        samples: drawn pictures of each.
        test_identities: drawn people to test on, none of them trained on; with `--faces` the parser
            alone is tested on them.
        test_samples: drawn pictures of each.
        backbone: name of a timm model; `iresnet.py` adds FSENet's to timm's own.
        map_size: side of the feature map whose cells the parts pool.
        part_dim: width of a part's vector after a linear map; None keeps the feature map's.
        steps: updates of each network.
        batch_size: pictures an update, over all processes and micro-batches.
        accumulate: micro-batches in which each process takes its share of an update, where memory
            is short.
        lr: first learning rate; the paper's is 0.1, for batches of 128.
        milestones: ascending fractions of the training at which the rate is divided by ten; the
            paper's are 1/4, 1/2 and 3/4, too early for trainings of minutes.
        warmup: fraction of the training over which the rate rises to `lr`.
        momentum: of SGD.
        weight_decay: of SGD.
        clip_norm: the largest norm of an update's gradient, over everything; 0 for any.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated
            and saved; 0 for none.
        margin: ArcFace's, radians.
        scale: of the cosines.
        local_loss_weight: of the local half's loss beside the global one's (eq. 3: 1).
        local_weight: of the local half in the descriptor (table 8: 0.6).
        test_time: `concatenation` of the vectors of a picture and its mirror image (eq. 5), or
            their `sum`.
        augmentation: how far training pictures are moved.
        precision: `fp32`, or `bf16` autocast; `auto` takes bf16 where the machine computes in it.
        compile: run the steps of the networks through `torch.compile`.
        workers: processes that decode pictures, for each process that trains.
        tensorboard: write TensorBoard's events into the run's folder.
    """

    profile: Literal["default", "lfw", "paper"] = "default"
    output: Path | None = None
    resume: bool = False
    seed: int = 0
    faces: tuple[Path, ...] = ()
    min_images: int = 1
    damaged: int = 0
    parsing: Path | None = None
    parser: Literal["train", "pretrained"] = "train"
    parser_options: ParserOptions = field(default_factory=small_parser)
    identities: int = 200
    samples: int = 36
    test_identities: int = 200
    test_samples: int = 6
    backbone: str = "iresnet10_small"
    map_size: int = 28
    part_dim: int | None = None
    steps: int = 750
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.05
    milestones: tuple[float, ...] = (0.7, 0.9, 0.97)
    warmup: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 0.0
    ema: float = 0.0
    margin: float = 0.1
    scale: float = 16.0
    local_loss_weight: float = 1.0
    local_weight: float = 0.6
    test_time: TestTime = "concatenation"
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    workers: int = 0
    tensorboard: bool = False

    def rate(self, done: float) -> float:
        """Return the learning rate when the fraction `done` of the training is over."""
        warm = min(1.0, (done + 1e-3) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * 0.1 ** sum(done >= milestone for milestone in self.milestones)


DEFAULT = Options()

PROFILES = {
    "default": DEFAULT,
    # Few pictures of many people: geometry and light are varied.
    "lfw": replace(
        DEFAULT,
        profile="lfw",
        parser="pretrained",
        steps=2600,
        milestones=(0.6, 0.85, 0.95),
        scale=24.0,
        augmentation=Augmentation(
            shift=0.06, scale=0.1, rotation=8, brightness=0.3, contrast=0.3, grey=0.1
        ),
    ),
    # docs/paper.md has the paper's sentence for each value.
    "paper": replace(
        DEFAULT,
        profile="paper",
        backbone="iresnet50",
        map_size=28,
        parser_options=ParserOptions(num_stacks=2, grid=128, steps=20_000),
        min_images=20,
        steps=400_000,
        batch_size=128,
        lr=0.1,
        milestones=(0.25, 0.5, 0.75),
        warmup=0.0,
        momentum=0.9,
        weight_decay=5e-4,
        margin=1.5,
        scale=64.0,
        local_loss_weight=1.0,
        local_weight=0.6,
        test_time="concatenation",
        workers=8,
    ),
}


def parse_options(arguments: list[str]) -> Options:
    """Read the command line; `--profile` chooses what the other options default to."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--profile", default="default")
    profile = finder.parse_known_args(arguments)[0].profile
    return tyro.cli(Options, args=arguments, default=PROFILES.get(profile, DEFAULT))
