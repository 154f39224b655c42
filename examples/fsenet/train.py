"""Train and evaluate FSENet, and a global-only network alike, with one command.

    python examples/fsenet/train.py                                   # drawn faces, no download
    python examples/fsenet/train.py --profile lfw --faces lfw112.zip  # real faces
    python examples/fsenet/train.py --resume                          # go on where a run was killed
    torchrun --nproc_per_node=2 examples/fsenet/train.py              # several processes

The first line takes at most eight minutes on two CPU cores. Expect in its table: both halves
joined above 90 %, the global-only network between 80 and 97 %, the untrained one near 50 %.
Everything a run leaves lies in one folder: network/, baseline/, metrics.json, report.html.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import numpy as np
import torch
from arms import arm_vectors, measure
from data.augment import augment
from data.batches import StepSampler, generator, load_batches
from data.faces import DrawnFaces, FaceData, draw_faces, picture_data, procedural_data
from data.shortcuts import shortcut_accuracies
from describe import Described, describe
from energy import energy_shares
from fit import Fitted, Schedule, Workplace, fit
from maps import cached_maps
from model import GlobalNet, TrainedFSENet, TrainedGlobalNet
from options import Options, parse_options
from protocols.procedural import strangers
from report import write_report
from run_folder import open_workplace, peak_memory_gb, plain, versions, write_json
from showcase import show_faces
from torch import Tensor, distributed, nn
from train_parser import score_parser, score_parsing_set, train_parser

from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS

TEST_FROM = 1_000_000  # drawn identities from here on are never trained on


def main(options: Options, place: Workplace) -> None:
    """Run the three stages and write what they leave."""
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = round(time.monotonic() - began, 1)
        began = time.monotonic()

    others = range(TEST_FROM, TEST_FROM + options.test_identities)
    test_faces = draw_faces(options.seed, others, options.test_samples, "drawing")
    train_faces = None
    if options.faces is None or options.parser == "train":
        people = range(options.identities)
        train_faces = draw_faces(options.seed, people, options.samples, "drawing")
    data = load_data(options, train_faces, test_faces)
    lap("data")

    # Stage 1: the parser, which from here on is fixed (3.2).
    stages: dict[str, Fitted] = {}
    if options.parser == "pretrained":
        parser = ParsingNet.pretrained().freeze()
    else:
        assert train_faces is not None
        parser = build_parser(options)
        stages["parser"] = train_parser(parser, train_faces, options, place)
    parser.to(place.device)
    parser_scores = score_parser(parser, test_faces.images[:600], test_faces.labels[:600], place)
    if options.parsing is not None:
        parser_scores["fasseg"] = score_parsing_set(parser, options.parsing, place)
    lap("parser")

    # Stage 2: FSENet, and alone the backbone that it has.
    net = build_network(options, parser, place)
    untrained = describe(net, data.test_images, place)
    somebody = strangers(data.pairs.identities, options.seed)
    energy = {"at initialisation": measure_energy(net, data, somebody, place)}
    maps = cached_maps(net, data.images, place) if data.images is not None else None
    torch.manual_seed(options.seed)
    joint = TrainedFSENet(
        net, data.num_identities, options.margin, options.scale, options.local_loss_weight
    )
    stages["joint"] = recognise("joint", joint, data, maps, options, place)
    lap("joint")
    baseline = build_baseline(options, place)
    torch.manual_seed(options.seed)
    alone = TrainedGlobalNet(baseline, data.num_identities, options.margin, options.scale)
    stages["global"] = recognise("global", alone, data, None, options, place)
    lap("global")

    # Stage 3: what the parts add, and whether it is the parts that add it.
    if place.rank > 0:
        return
    mean_maps = None if maps is None else maps.float().mean(0)
    described = describe(
        net, data.test_images, place, mean_maps=mean_maps, strangers=torch.from_numpy(somebody)
    )
    arms = arm_vectors(described, describe(baseline, data.test_images, place), untrained)
    numbers, tests, scores = measure(arms, data.pairs)
    energy["after training"] = measure_energy(net, data, somebody, place)
    shortcuts = {}
    if options.faces is None:
        shortcuts = shortcut_accuracies(options.seed, TEST_FROM)
    lap("evaluation")

    net.save_pretrained(place.folder / "network")
    baseline.save_pretrained(place.folder / "baseline")
    with open(place.folder / "history.jsonl", "w") as file:
        for fitted in stages.values():
            file.writelines(json.dumps(row) + "\n" for row in fitted.history)
    np.savez(
        place.folder / "scores.npz",
        same=data.pairs.same,
        arm_names=np.array(list(scores)),
        scores=np.stack(list(scores.values())).astype(np.float32),
    )
    np.savez(place.folder / "faces.npz", **show_faces(net, test_faces, place))
    metrics = {
        "protocol": data.protocol,
        "config": plain(options),
        "versions": versions(),
        "precision": place.precision,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_memory_gb": round(peak_memory_gb(), 2),
        "parser": parser_scores,
        "shortcuts": shortcuts,
        "arms": numbers,
        "paired_tests": tests,
        "energy": energy,
        "training": {name: describe_stage(fitted, options) for name, fitted in stages.items()},
    }
    write_json(metrics, place.folder / "metrics.json")
    print_table(metrics)
    print(f"report: {write_report(place.folder)}")


def load_data(
    options: Options, train_faces: DrawnFaces | None, test_faces: DrawnFaces
) -> FaceData:
    """Return the pictures and pairs of this run."""
    if options.faces is not None:
        return picture_data(options.faces, options.seed)
    assert train_faces is not None
    flags = {"seed": options.seed, "identities": options.test_identities, "from": TEST_FROM}
    return procedural_data(train_faces, test_faces, options.seed, flags)


def build_parser(options: Options) -> ParsingNet:
    """Return a parser with fresh weights."""
    torch.manual_seed(options.seed)
    how = options.parser_options
    return ParsingNet(HELEN, how.width, how.num_stacks, grid=how.grid)


def build_network(options: Options, parser: ParsingNet, place: Workplace) -> PartLocalNet:
    """Return FSENet with fresh weights, the same in the backbone as the baseline's."""
    torch.manual_seed(options.seed)
    net = PartLocalNet(
        Backbone(options.backbone, map_size=options.map_size),
        parser,
        FSENET_PARTS,
        part_dim=options.part_dim,
        local_weight=options.local_weight,
    )
    return net.to(place.device, memory_format=torch.channels_last)


def build_baseline(options: Options, place: Workplace) -> GlobalNet:
    """Return the global-only network with fresh weights."""
    torch.manual_seed(options.seed)
    net = GlobalNet(Backbone(options.backbone, map_size=options.map_size))
    return net.to(place.device, memory_format=torch.channels_last)


def recognise(  # noqa: PLR0913
    stage: str,
    module: TrainedFSENet | TrainedGlobalNet,
    data: FaceData,
    maps: Tensor | None,
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
    batch_size = options.batch_size // place.world

    def batches(first: int) -> Iterator[Sequence[Tensor | None]]:
        sampler = StepSampler(
            len(data.train),  # type: ignore[arg-type]
            batch_size,
            (first, options.steps),
            options.seed,
            place.rank,
            place.world,
        )
        loaded = load_batches(data.train, sampler, options.workers)
        for step, (images, identities, index) in enumerate(loaded, start=first):
            rng = generator(options.seed, step, place.rank)
            own = None if maps is None else maps[index].float()
            pixels, moved = augment(
                images, own, HELEN.select(*FSENET_PARTS), options.augmentation, rng
            )
            yield pixels.contiguous(memory_format=torch.channels_last), moved, identities

    return fit(stage, module, batches, Schedule(options.steps, options.rate, optimizer), place)


def measure_energy(
    net: PartLocalNet, data: FaceData, somebody: np.ndarray, place: Workplace
) -> dict[str, dict[str, float]]:
    """Return the shares of the local vector's energy on pictures that nobody trained on."""
    return energy_shares(net, data.test_images, torch.from_numpy(somebody), place)


def describe_stage(fitted: Fitted, options: Options) -> dict[str, float]:
    """Return how fast a stage went and how long it waited for data."""
    return {
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "steps_per_second": round(fitted.steps / max(fitted.seconds, 1e-9), 2),
        "data_wait_share": round(fitted.wait_seconds / max(fitted.seconds, 1e-9), 4),
    }


def print_table(metrics: dict[str, Any]) -> None:
    """Print what the run found."""
    rows = {name: value["accuracy"] for name, value in metrics["shortcuts"].items()}
    for name, accuracy in rows.items():
        print(f"shortcut {name:<28} {100 * accuracy:6.2f} %")
    parser = metrics["parser"]
    print(f"parser   macro-F1 {parser['macro_f1']:.3f}  mIoU {parser['miou']:.3f}")
    print(f"{'arm':<34} {'accuracy':>17} {'AUC':>7} {'rank 1':>8}")
    for name, arm in metrics["arms"].items():
        share = f"{100 * arm['accuracy']:.2f} ± {100 * arm['standard_error']:.2f} %"
        print(f"{name:<34} {share:>17} {arm['auc']:7.4f} {100 * arm['rank_1']:7.2f}%")
    for test in metrics["paired_tests"]:
        print(
            f"{test['a']} - {test['b']}: {100 * test['difference']:+.2f} "
            f"± {100 * test['standard_error']:.2f} %, p = {test['p_value']:.2g}"
        )
    print(f"{metrics['seconds']['total']:.0f} s, {metrics['peak_memory_gb']:.1f} GB at the peak")


if __name__ == "__main__":
    try:
        chosen = parse_options(sys.argv[1:])
        main(chosen, open_workplace(chosen))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
