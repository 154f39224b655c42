"""Train and evaluate FSENet, and a global-only network alike, with one command.

    python examples/fsenet/train.py                                   # drawn faces, no download
    python examples/fsenet/train.py --profile lfw --faces lfw112.zip  # real faces
    python examples/fsenet/train.py --resume                          # go on where a run was killed
    torchrun --nproc_per_node=2 examples/fsenet/train.py              # several processes

The first line takes five to eight minutes on two CPU cores. Expect in its table: both halves joined
near 90 %, the global-only network between 87 and 90 %, the untrained one near 56 %.
Everything a run leaves lies in one folder: network/, baseline/, metrics.json, report.html.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import timm
import torch
from arms import arm_vectors, measure
from data.augment import augment
from data.batches import BatchPlan, load_batches
from data.faces import (
    TEST_FROM,
    DrawnFaces,
    TestSet,
    TrainingSet,
    draw_faces,
    drawn_sets,
    is_lfw,
    picture_sets,
)
from data.pair_sets import IN_TWO_PARTS
from data.parsing_layouts import open_parsing_set
from data.pictures import reader_of
from data.shortcuts import shortcut_accuracies
from describe import describe
from energy import energy_shares
from errors import one_line_errors
from fit import Batch, fit
from limits import check_batch, check_milestones, check_numbers
from machine import peak_memory_gb, versions
from maps import cached_maps, mean_maps
from model import GlobalNet, TrainedFSENet, TrainedGlobalNet, compiled
from options import PROFILES, Options, parse_options
from protocols.pairs import strangers
from report import write_report
from results import print_results, write_results
from run_folder import bind, plain, workplace
from schedule import Average, Schedule
from score_parser import score_parser, score_parsing_set
from showcase import show_faces
from telemetry import Fitted, check_tensorboard
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import TensorDataset
from train_parser import build_parser, check_training, train_parser
from workplace import Workplace

from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS

PARSING_SPLIT = "fasseg:frontal02-test"  # kind and split on which `--parsing` scores the parser
FACES = {  # what a profile is made for
    "lfw": IN_TWO_PARTS,
    "paper": "pictures of people, see docs/data.md",
}


class Laps(dict[str, float]):
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def end(self, name: str) -> None:
        """Note the time since the last lap."""
        now = time.monotonic()
        self[name], self.began = round(now - self.began, 1), now


def main(options: Options, place: Workplace) -> None:
    """Run the three stages and write what they leave."""
    laps, stages = Laps(), dict[str, Fitted]()
    sets = None if not options.faces else read_faces(options, place)
    others = range(TEST_FROM, TEST_FROM + options.test_identities)
    drawn_test = draw_faces(options.seed, others, options.test_samples)
    drawn = None
    if sets is None or options.parser == "train":
        drawn = draw_faces(options.seed, range(options.identities), options.samples)
    train, test = sets or drawn_sets(drawn, drawn_test, options.seed)
    laps.end("data")

    # Stage 1: the parser, which from here on is fixed (3.2).
    parser, parser_scores = parse(options, drawn, drawn_test, stages, place)
    laps.end("parser")

    # Stage 2: FSENet, and alone the backbone that it has.
    net, baseline = build_networks(options, parser, place)
    somebody = torch.from_numpy(strangers(test.pairs.identities, options.seed))
    untrained = describe(net, test.images, place, test_time=options.test_time)
    energy = {"at initialisation": energy_shares(net, test.images, somebody, place)}
    cached = None if train.images is None else cached_maps(net, train.images, place)
    how = (train.num_identities, options.margin, options.scale)
    torch.manual_seed(options.seed)
    joint = TrainedFSENet(net, *how, options.local_loss_weight, spread=place.world > 1)
    stages["joint"] = recognise("joint", joint, train, cached, options, place)
    laps.end("joint")
    torch.manual_seed(options.seed)
    alone = TrainedGlobalNet(baseline, *how, spread=place.world > 1)
    stages["global"] = recognise("global", alone, train, None, options, place)
    laps.end("global")
    train.damage.gather()
    if place.rank > 0:
        return

    # Stage 3: what the parts add, and whether it is the parts that add it.
    described = describe(
        net,
        test.images,
        place,
        mean_maps=mean_maps(net, train, cached, place),
        strangers=somebody,
        test_time=options.test_time,
    )
    described_alone = describe(baseline, test.images, place, test_time=options.test_time)
    arms = arm_vectors(described, described_alone, untrained)
    numbers, tests, scores = measure(arms, test)
    energy["after training"] = energy_shares(net, test.images, somebody, place)
    shortcuts = {}
    if not options.faces:
        pictures = drawn_test.images.permute(0, 2, 3, 1).numpy()
        labels = drawn_test.labels.numpy()
        shortcuts = shortcut_accuracies(pictures, labels, test.pairs, options.seed)
    laps.end("evaluation")

    net.save_pretrained(place.folder / "network")
    baseline.save_pretrained(place.folder / "baseline")
    metrics = {
        "protocol": {**test.flags, "trained_on": train.size, "tested_on": test.size},
        "damaged": train.damage.count,
        "config": plain(options),
        "versions": versions(),
        "precision": place.precision,
        "seconds": {**laps, "total": round(sum(laps.values()), 1)},
        "peak_memory_gb": peak_memory_gb(),
        "parser": parser_scores,
        "shortcuts": shortcuts,
        "arms": numbers,
        "paired_tests": tests,
        "energy": energy,
    }
    faces = show_faces(net, drawn_test, place)
    write_results(place.folder, metrics, stages, test.pairs.same, scores, faces)
    print_results(metrics)
    print(f"report: {write_report(place.folder)}")


def check(options: Options) -> None:
    """Refuse what would fail only after minutes, or silently be something else."""
    if options.profile in FACES and not options.faces:
        raise ValueError(f"--profile {options.profile} needs --faces: {FACES[options.profile]}")
    for path in options.faces:
        reader_of(path)
    if options.profile == "lfw" and not is_lfw(options.faces):
        raise ValueError(
            f"--profile lfw needs --faces: {IN_TWO_PARTS} (pairs.txt), alone; got "
            f"{' '.join(map(str, options.faces))}: leave --profile out to train on other people"
        )
    if options.parsing is not None:
        open_parsing_set(f"{options.parsing}:{PARSING_SPLIT}")
    if not timm.is_model(options.backbone):
        raise ValueError(f"--backbone: timm knows no {options.backbone!r}; see docs/backbones.md")
    check_milestones(options.milestones)
    check_numbers(options)
    drawn = options.identities * options.samples
    pictures = None if options.faces else drawn
    check_batch("--batch-size", options.batch_size, pictures, options.accumulate)
    if options.tensorboard:
        check_tensorboard()
    usual = PROFILES[options.profile].parser_options
    if options.parser == "pretrained" and options.parser_options != usual:
        raise ValueError("--parser-options are for --parser train: leave them out")
    if options.parser == "train":
        check_training(options.parser_options)
        check_batch("--parser-options.batch-size", options.parser_options.batch_size, drawn)


def read_faces(options: Options, place: Workplace) -> tuple[TrainingSet, TestSet]:
    """Read what `--faces` names, the same for all processes and for all of a run."""
    train, test = picture_sets(options.faces, options.seed, options.min_images, options.damaged)
    check_batch("--batch-size", options.batch_size, len(train.dataset))
    bind(place, {"pictures": train.size, "sha256": train.fingerprint})
    if place.rank == 0:
        pairs = f"{len(test.pairs.same)} pairs of {test.flags['name']}"
        print(f"--faces: {train.size} to train on, {pairs} to test on", file=sys.stderr)
    return train, test


def parse(
    options: Options,
    drawn: DrawnFaces | None,
    drawn_test: DrawnFaces,
    stages: dict[str, Fitted],
    place: Workplace,
) -> tuple[ParsingNet, dict[str, Any]]:
    """Train the parser, or take the one that partlocal ships; freeze and score it."""
    if options.parser == "pretrained":
        parser = ParsingNet.pretrained()
    else:
        how = options.parser_options
        torch.manual_seed(options.seed)
        parser = build_parser(how)
        faces = TensorDataset(drawn.images, drawn.labels)
        stages["parser"] = train_parser(parser, faces, how, options.seed, place)
    parser.freeze().to(place.device)
    scores = score_parser(parser, drawn_test.images[:600], drawn_test.labels[:600], place)
    if options.parsing is not None:
        pairs = open_parsing_set(f"{options.parsing}:{PARSING_SPLIT}")
        scores["fasseg"] = score_parsing_set(parser, pairs, place)
    return parser, scores


def build_networks(
    options: Options, parser: ParsingNet, place: Workplace
) -> tuple[PartLocalNet, GlobalNet]:
    """Return FSENet and the baseline; their backbones begin with the same weights."""
    torch.manual_seed(options.seed)
    net = PartLocalNet(
        Backbone(options.backbone, map_size=options.map_size),
        parser,
        FSENET_PARTS,
        part_dim=options.part_dim,
        local_weight=options.local_weight,
    )
    torch.manual_seed(options.seed)
    baseline = GlobalNet(Backbone(options.backbone, map_size=options.map_size))
    as_cpus_like = {"device": place.device, "memory_format": torch.channels_last}
    return net.to(**as_cpus_like), baseline.to(**as_cpus_like)


def recognise(
    stage: str,
    module: TrainedFSENet | TrainedGlobalNet,
    train: TrainingSet,
    cached: tuple[Tensor, Tensor] | None,
    options: Options,
    place: Workplace,
) -> Fitted:
    """Train one of the two networks; both see the same pictures in the same order."""
    module.to(place.device)
    optimizer = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad],
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    plan = BatchPlan(
        options.batch_size,
        options.steps,
        options.seed,
        place.rank,
        place.world,
        options.workers,
        options.accumulate,
    )
    net = module.net
    parts = net.parser.labels.select(*net.parts) if isinstance(net, PartLocalNet) else HELEN

    def batches(first: int) -> Iterator[Batch]:
        for numbers, (images, identities, index) in load_batches(train.dataset, plan, first):
            maps, visibility = (None, None) if cached is None else (c[index] for c in cached)
            yield images, maps, identities, visibility, numbers

    def prepare(
        images: Tensor,
        maps: Tensor | None,
        identities: Tensor,
        visibility: Tensor | None,
        numbers: Tensor,
    ) -> Batch:
        own = None if maps is None else maps.float()
        batch = augment(images, own, parts, options.augmentation, numbers)
        if visibility is not None:
            visibility = batch.swap(visibility, parts)
        pixels = batch.images.contiguous(memory_format=torch.channels_last)
        return pixels, batch.maps, identities, visibility

    average = None
    if options.ema:
        average = Average(module.net, ModelEmaV3(module.net, options.ema))
    schedule = Schedule(
        options.steps, options.rate, optimizer, options.accumulate, options.clip_norm, average
    )
    with compiled(module.net) if options.compile else nullcontext():
        return fit(stage, module, batches, schedule, place, prepare)


if __name__ == "__main__":
    with one_line_errors():
        chosen = parse_options(sys.argv[1:])
        check(chosen)
        with workplace(chosen, chosen.profile) as place:
            main(chosen, place)
