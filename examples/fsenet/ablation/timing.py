"""Table 14: what parsing costs when pictures are described."""

import time
from collections.abc import Callable
from typing import Any

import torch
from machine import versions
from model import GlobalNet
from options import Options
from torch import Tensor
from workplace import Workplace

from ablation.arms import Arm
from ablation.networks import build_network
from ablation.paper import conflicts, paper_row, read_paper
from ablation.study import Study
from partlocal import ParsingNet

TIMES = 14  # the table's number
BATCH = 50


def measure_times(study: Study) -> dict[str, Any]:
    """Return table 14: the times of describing 12,000 pictures, 600 of a quick study."""
    paper, place = read_paper(), study.place
    parser = ParsingNet.pretrained().freeze().to(place.device)
    times = time_arms(study.options, parser, place, 600 if study.quick else 12_000)
    return {
        "table": TIMES,
        "title": "time",
        "data": study.data,
        "evidence": not study.quick,
        "backbone": study.options.backbone,
        "threads": torch.get_num_threads(),
        "precision": place.precision,
        "versions": {name: [version] for name, version in versions().items()},
        "times": [
            {"name": name, **spent, "paper": paper_row(paper, TIMES, name)}
            for name, spent in times.items()
        ],
        "conflicts": conflicts(paper, TIMES),
    }


@torch.inference_mode()
def time_arms(
    options: Options, parser: ParsingNet, place: Workplace, pictures: int, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Return milliseconds a picture and seconds for all of them, of three ways to describe them.

    Ways take turns in every round, so that a machine that slows down slows all; the medians count.

    Args:
        options: of the run.
        parser: frozen.
        place: where it computes.
        pictures: to describe, from memory, each one view; what is in them does not matter.
        rounds: into which they are cut.
    """
    net = build_network(Arm(), options, parser).to(place.device).eval()
    alone = build_network(Arm(kind="global"), options, parser).to(place.device).eval()
    assert isinstance(alone, GlobalNet)
    images = torch.randint(0, 256, (BATCH, 3, 112, 112), dtype=torch.uint8, device=place.device)
    maps, visibility = net.parse(images)
    ways = {
        "without parsing": lambda: alone(images),
        "without hourglass": lambda: net(images, maps, visibility),
        "FSENet": lambda: net(images),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    batches = max(1, pictures // rounds // BATCH)
    for way in ways.values():
        _run(way, 2, place)
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            _run(way, batches, place)
            seconds[name].append(time.perf_counter() - began)
    return {
        name: {
            "milliseconds": 1000 * sorted(spent)[rounds // 2] / (batches * BATCH),
            "seconds": sum(spent),
            "pictures": rounds * batches * BATCH,
        }
        for name, spent in seconds.items()
    }


def _run(way: Callable[[], Tensor], batches: int, place: Workplace) -> None:
    for _ in range(batches):
        with place.autocast():
            result = way()
    result.sum().item()  # waits for the device
