"""The paper's tables rerun: arms, networks, verdicts, and whole small studies."""

import importlib
import itertools
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import ablation.guides
import ablation.study
import ablation.timing
import iresnet  # noqa: F401
import numpy as np
import pytest
import scipy.stats
import torch
import train_parser
from ablation.arms import FSENET, Arm
from ablation.evidence import claim_text, in_paper, print_table, print_times, write_evidence
from ablation.guides import gaussians, landmarks_of, parser_of
from ablation.networks import AnnealedSphereFace, PlainSoftmax, build_network, supervise
from ablation.paper import read_paper
from ablation.study import Study
from ablation.tables import TABLES, Row, Table
from ablation.timing import time_arms
from ablation.trial import Trial
from ablation.verdict import compare, judge, spread, student_t
from ablation.world import World, lfw_world
from data.faces import TestSet as Faces
from data.faces import draw_faces
from matplotlib import pyplot as plt
from options import PROFILES
from torch.nn import functional as F
from workplace import Workplace

from partlocal import HELEN, ParsingNet, SphereFace
from partlocal.backbone import Backbone
from partlocal.evaluation import auc, ten_fold_accuracy
from partlocal.landmarks import soft_argmax
from partlocal.local import LocalOptions

SMALL = replace(
    PROFILES["default"],
    parser="pretrained",
    identities=20,
    samples=2,
    test_identities=20,
    test_samples=3,
    steps=2,
    batch_size=8,
)


@pytest.fixture(scope="module")
def parser():
    return ParsingNet.pretrained().freeze()


@pytest.fixture(scope="module")
def landmarks():
    torch.manual_seed(0)
    net = ParsingNet(68, 8, 1, grid=32).train()
    net(torch.rand(4, 3, 112, 112))
    return net.freeze()


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8, generator=rng)


SECOND_TRANSCRIPTION = {  # typed anew: table, row, measure
    ("1", "ArcFace", "YTF"): 98.02,
    ("1", "FSENet", "YTF"): 97.89,
    ("3", "FSENet", "IJB-B TAR@1e-4"): 0.945,
    ("3", "FSENet", "IJB-C TAR@1e-4"): 0.942,
    ("5", "people with enough pictures", "people"): 85e3,
    ("5", "people with enough pictures", "pictures"): 7.2e6,
    ("5", "all people", "people"): 110e3,
    ("5", "all people", "pictures"): 8e6,
    ("7", "global", "accuracy"): 99.67,
    ("7", "global", "MegaFace(C) Id."): 97.53,
    ("7", "global + local", "IJB-A, first column"): 92.29,
    ("7", "global + local", "IJB-A, second column"): 98.61,
    ("7", "global + local", "IJB-C TAR@1e-4"): 95.08,
    ("7", "global + local", "MegaFace(C) Ver."): 98.43,
    ("8", "global", "MegaFace(C) Id."): 95.03,
    ("9", "FSENet", "IJB-C TAR@1e-4"): 95.08,
    **{
        (table, row, f"IJB-A, {column} column"): value
        for table, row in (
            ("9", "FSENet"),
            ("10", "2 stacks, bottleneck 4x4"),
            ("11", "six parts"),
            ("12", "28x28"),
            ("13", "sum, norm"),
        )
        for column, value in (("first", 92.93), ("second", 98.62))
    },
    ("12", "28x28", "one measure"): 97.09,
    ("14", "without parsing", "accuracy"): 94.42,
    ("14", "without hourglass", "accuracy"): 99.67,
    ("elsewhere", "FSENet", "IJB-B TAR@1e-4"): 94.35,
    ("elsewhere", "FSENet", "MegaFace(C) Ver."): 98.48,
    ("elsewhere", "FSENet", "one measure of table 12"): 97.07,
    ("sources", "summed", "a first set"): 4e6,
    ("sources", "summed", "VGGFace2"): 2.21e6,
    ("sources", "summed", "a third set"): 0.6e6,
    ("sources", "stated", "pictures"): 8e6,
    ("sources", "in two parts", "FaceScrub, one part"): 55742,
    ("sources", "in two parts", "FaceScrub, the other"): 52076,
    ("sources", "said elsewhere", "VGGFace2"): 3e6,
    ("sources", "said elsewhere", "FaceScrub"): 100e3,
}


def test_paper_tables_were_transcribed_twice():
    paper = read_paper()
    cells = {
        (table, row, measure): value
        for table, content in paper["tables"].items()
        for row, measures in content["rows"].items()
        for measure, value in measures.items()
    }
    assert cells == SECOND_TRANSCRIPTION
    cited = (cell for conflict in paper["conflicts"] for cell in conflict["cells"])
    named = {tuple(cell.split("/")) for cell in cited}
    best = {("10", f"2 stacks, bottleneck {side}", "FAR 1e-6") for side in ("2x2", "4x4", "8x8")}
    assert named - set(cells) == best  # were not transcribed


def test_the_paper_calls_rows_as_the_tables_do():
    paper = read_paper()["tables"]
    for number, table in TABLES.items():
        named = paper.get(str(number), {"rows": {}})["rows"]
        assert set(named) <= {row.name for row in table.rows}
        claimed = {name for pair in (*table.claims, *table.controls) for name in pair}
        assert claimed <= {row.name for row in table.rows}


def test_arms_have_names_of_their_own_and_are_shared():
    rows = [row for table in TABLES.values() for row in table.rows]
    arms = {row.arm for row in rows}
    assert len({arm.slug() for arm in arms}) == len(arms)
    shared = [number for number, t in TABLES.items() if any(r.arm == FSENET for r in t.rows)]
    assert shared == [7, 8, 9, 11, 12, 13]


@pytest.mark.parametrize("kind", ["fsenet", "global", "wide", "parsing", "landmarks", "guided"])
def test_networks(kind, parser, landmarks, images):
    torch.manual_seed(0)
    arm = Arm(kind=kind)
    net = build_network(arm, SMALL, parser, landmarks)
    trained = supervise(arm, net, 5, SMALL, 10)
    trained(images, None, torch.arange(4)).loss.backward()
    frozen = {id(p) for guide in (parser, landmarks) for p in guide.parameters()}
    assert all((p.grad is not None) != (id(p) in frozen) for p in trained.parameters())
    width = {"fsenet": 380, "wide": 380, "parsing": 512}.get(kind, 128)
    described = net.eval()(images)
    assert described.shape == (4, width)
    if kind != "fsenet":
        torch.testing.assert_close(described.norm(dim=1), torch.ones(4))


def test_parser_features_against_a_loop(parser, images):
    net = build_network(Arm(kind="parsing"), SMALL, parser).backbone.eval()
    with torch.no_grad():
        found = net(images)
        logits = parser.forward_stacks(images, parser.grid)[-1]
        again = parser.stacks[-1].head(found.features)
    torch.testing.assert_close(again, logits)  # they are what the logits are made of
    shares = logits.softmax(1)
    vectors = torch.stack(
        [
            torch.cat(
                [
                    (found.features[i] * shares[i, label]).sum((1, 2)) / shares[i, label].sum()
                    for label in range(11)
                ]
            )
            for i in range(4)
        ]
    )
    torch.testing.assert_close(found.global_vector, net.linear(vectors), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["landmarks", "guided"])
def test_a_guide_of_no_weight_changes_nothing(kind, parser, landmarks, images):
    torch.manual_seed(0)
    guided = build_network(Arm(kind=kind), SMALL, parser, landmarks).backbone
    plain = Backbone(SMALL.backbone, map_size=28)
    block, old = guided.backbone.model.layer3[0], plain.model.layer3[0]
    own = dict(guided.backbone.model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if own[name].shape == parameter.shape:
                parameter.copy_(own[name])
        old.conv1.weight.copy_(block.conv1.weight[:, :32])
        old.downsample[0].weight.copy_(block.downsample[0].weight[:, :32])
        with_guide = guided.eval()(images).global_vector
        block.conv1.weight[:, 32:] = 0
        block.downsample[0].weight[:, 32:] = 0
        without = guided(images).global_vector
        expected = plain.eval()(images).global_vector
    torch.testing.assert_close(without, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(with_guide, expected, atol=1e-3)


def test_supervision(parser):
    losses = {}
    for supervision in ("arcface", "softmax", "a-softmax", "cosface"):
        arm = Arm(kind="global", supervision=supervision, margin=0.3)
        head = supervise(arm, build_network(arm, SMALL, parser), 5, SMALL, 10).global_head
        losses[supervision] = head
    assert losses["arcface"].margin.m == losses["cosface"].margin.m == 0.3
    head = losses["softmax"]
    assert isinstance(head, PlainSoftmax)
    unit, norm = F.normalize(torch.randn(3, 128)), torch.tensor([2.0, 3.0, 4.0])
    labels = torch.tensor([0, 4, 1])
    logits = (unit * norm[:, None]) @ head.linear.weight.T + head.linear.bias
    expected = sum(
        torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels, strict=True)
    )
    torch.testing.assert_close(head(unit, labels, norm), expected / 3)
    torch.testing.assert_close(head(unit, labels), head(unit, labels, torch.full((3,), 128**0.5)))


def test_a_softmax_anneals():
    margin, cos, norm = AnnealedSphereFace(steps=4).train(), torch.tensor([0.3]), torch.ones(1)
    for done in (0, 7000, 14000, 21000):
        blend = max(5.0, 1000 / (1 + 0.12 * done))
        psi = SphereFace(4.0)(cos, norm)
        torch.testing.assert_close(margin(cos, norm), (psi + blend * cos) / (1 + blend))
    before = margin.step.clone()
    margin.eval()(cos, norm)
    assert margin.step == before


def test_targets_of_landmarks():
    rng = torch.Generator().manual_seed(0)
    points = 20 + 70 * torch.rand(2, 68, 2, generator=rng)
    target = gaussians(points, size=112, grid=32)
    torch.testing.assert_close(target.sum((2, 3)), torch.ones(2, 68))
    found = soft_argmax(target.clamp(min=1e-30).log(), size=(112, 112))
    torch.testing.assert_close(found, points, atol=0.02, rtol=0)


def test_guides_are_trained(tmp_path):
    place = Workplace(tmp_path, torch.device("cpu"))
    how = replace(SMALL, identities=40)  # a batch of the parser's
    faces = draw_faces(0, range(40), 1)
    parser = parser_of(Arm(parser=(1, 8)), faces, how, 0, place)
    assert (parser.num_stacks, parser.bottleneck_size, parser.frozen) == (1, 8, True)
    assert (tmp_path / "parser-1-8-seed0/parser.pt").exists()
    assert landmarks_of(how, 0, place).frozen
    with pytest.raises(ValueError, match="faces must be drawn ones to train the parser"):
        parser_of(Arm(parser=(1, 8)), None, how, 0, place)


def test_landmarks_are_trained_as_the_parser_is(tmp_path, monkeypatch):
    """Both see the same moved pictures, and points lie where the labels are."""
    kept = []

    def keep(stage, module, batches, schedule, place, prepare):
        kept.append((prepare(*next(batches(0))), schedule))

    for module in (ablation.guides, train_parser):
        monkeypatch.setattr(module, "fit", keep)
    place, how = Workplace(tmp_path, torch.device("cpu")), replace(SMALL, identities=40)
    landmarks_of(how, 0, place)
    parser_of(Arm(parser=(1, 4)), draw_faces(0, range(40), how.samples), how, 0, place)
    ((images, points), schedule), ((others, labels), other) = kept
    assert torch.equal(images, others)
    assert schedule.steps == other.steps
    assert [schedule.lr(x / 9) for x in range(10)] == [other.lr(x / 9) for x in range(10)]
    distances = []
    for label, eye in (("left_eye", range(36, 42)), ("right_eye", range(42, 48))):
        for number, mask in enumerate(labels == HELEN.index(label)):
            if mask.sum() > 30:
                seen = mask.nonzero().flip(1).float().mean(0)
                distances.append((points[number, list(eye)].mean(0) - seen).norm())
    assert len(distances) > 30
    # two pixels where they do not move alike, thirty where left and right do not trade places
    assert torch.stack(distances).quantile(0.9) < 1


def test_people_of_a_world():
    identities = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    nobody = Faces(images[:0], (), None, {})
    world = World(0, images, identities, identities < 4, nobody, "enough")

    def trained_on(people):
        chosen = world.train(people)
        numbers = [int(label) for _, label, _ in chosen.dataset]
        return chosen.images[:, 0, 0, 0].tolist(), numbers, chosen.num_identities

    assert trained_on(None) == trained_on("enough")
    assert trained_on("enough") == (list(range(8)), [0, 0, 1, 1, 2, 2, 3, 3], 4)
    assert trained_on("half") == ([0, 1, 4, 5], [0, 0, 1, 1], 2)
    assert trained_on("quarter") == ([0, 1], [0, 0], 1)
    assert trained_on("all") == (list(range(10)), identities.tolist(), 6)


def test_five_seeds_test_all_folds_of_lfw(tmp_path, lfw_like):
    path = lfw_like(tmp_path / "lfw.zip")
    tested, pairs = [], 0
    for seed in range(5):
        world = lfw_world(seed, path)
        own = {name.split("/")[0] for name in world.test.names}
        assert own == {f"P{4 * seed + i:03}" for i in range(4)}
        tested += sorted(own)
        pairs += len(world.test.pairs.same)
        assert world.train(None).num_identities == 18
        assert not world.enough.any()  # three pictures each
    assert (len(set(tested)), len(tested), pairs) == (20, 20, 40)
    assert torch.equal(lfw_world(5, path).test.images, lfw_world(0, path).test.images)


@pytest.fixture
def trial():
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 100)
    halves = {
        name: rng.normal(same * shift, 1)
        for name, shift in (("global half", 1.0), ("local half", 0.5), ("mean maps", 0.2))
    }
    return Trial(same, np.repeat(np.arange(10), 20), halves, {"seed": 0})


def test_both_halves_score_as_the_joined_vector():
    rng = torch.Generator().manual_seed(0)
    g = F.normalize(torch.randn(2, 50, 8, generator=rng), dim=2)
    l = F.normalize(torch.randn(2, 50, 5, generator=rng), dim=2)  # noqa: E741
    scores = {name: (h[0] * h[1]).sum(1).numpy() for name, h in (("global half", g), ("x", l))}
    trial = Trial(None, None, {**scores, "local half": scores["x"]}, {})
    joined = F.normalize(torch.cat([g, 0.6 * l], 2), dim=2)
    for vector in ("both", "x"):
        np.testing.assert_allclose(
            trial.cosines(vector, 0.6), (joined[0] * joined[1]).sum(1), atol=1e-6
        )
    np.testing.assert_array_equal(trial.cosines("local half", 0.6), scores["x"])


def test_trials_are_kept(trial, tmp_path):
    path = tmp_path / "trial.npz"
    trial.save(path)
    loaded = Trial.load(path)
    assert loaded.about == {"seed": 0}
    np.testing.assert_array_equal(loaded.fold, trial.fold)
    np.testing.assert_array_equal(
        loaded.scores["mean maps"], trial.scores["mean maps"].astype(np.float32)
    )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        Trial.load(path)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
def test_students_t(freedom):
    assert math.isclose(student_t(freedom), scipy.stats.t.ppf(0.975, freedom), rel_tol=1e-4)


def test_spread_against_scipy():
    values = [0.81, 0.84, 0.79, 0.83]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert np.allclose(spread(values), [np.mean(values), np.std(values, ddof=1), low, high])
    assert spread([0.5]) == (0.5, None, None, None)


def test_verdicts():
    right, wrong = np.ones(50, bool), np.arange(50) % 5 > 0
    found = compare("a", "b", {"a": [right] * 3, "b": [wrong] * 3})
    assert (found["difference"], found["pairs"], found["verdict"]) == (
        pytest.approx(0.2),
        150,
        "better",
    )
    assert compare("b", "a", {"a": [right] * 3, "b": [wrong] * 3})["verdict"] == "worse"
    assert compare("a", "b", {"a": [right, wrong], "b": [wrong, right]})["verdict"] == "not decided"
    # one seed: the pairs decide
    assert compare("a", "b", {"a": [right], "b": [wrong]})["verdict"] == "better"
    almost = right.copy()
    almost[0] = False
    assert compare("a", "b", {"a": [right], "b": [almost]})["verdict"] == "not decided"


def test_judge(trial):
    rows = (
        Row("global", vector="global half"),
        Row("both", weight=0.3),
        Row("as the run", weight=None),
    )
    table = Table("test", rows, (("both", "global"),), (("both", "as the run"),))
    judged, claims = judge(table, {FSENET: [trial, trial]}, weight=0.6)
    assert [row["name"] for row in judged] == ["global", "both", "as the run"]
    for row, weight in zip(judged[1:], (0.3, 0.6), strict=True):
        cosines = trial.scores["global half"] + weight**2 * trial.scores["local half"]
        expected = ten_fold_accuracy(cosines, trial.same, trial.fold).mean
        assert row["by_seed"]["accuracy"] == [pytest.approx(expected)] * 2
        assert row["over_seeds"]["auc"]["mean"] == pytest.approx(auc(cosines, trial.same))
    assert [claim["of_the_paper"] for claim in claims] == [True, False]


@pytest.fixture(scope="module")
def small():
    """Drawn worlds of twenty people and trainings of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablation.study.PROFILES, "default", SMALL)
        patch.setitem(ablation.study.STEPS, "procedural", SMALL.steps)
        yield


@pytest.fixture(scope="module")
def studied(small, tmp_path_factory):
    """All trials of table 7 and two seeds, and where they are kept."""
    output = tmp_path_factory.mktemp("trials")
    study = Study(seeds=2, output=output)
    study.check()
    return study, study.collect([row.arm for row in TABLES[7].rows])


def test_a_study(studied):
    study, trials = studied
    counts = {arm.kind: len(found) for arm, found in trials.items()}
    assert counts == {"global": 2, "wide": 2, "fsenet": 2}
    about = trials[FSENET][0].about
    assert (about["steps"], about["people"], about["pictures"]) == (SMALL.steps, 20, 40)
    assert about["numbers"] == 2 * 380  # of both views
    assert not list(study.place.folder.glob("*-unfinished"))
    assert not list(study.place.folder.glob("maps-*"))
    scores = [trial.scores["global half"] for trial in trials[FSENET]]
    assert not np.array_equal(*scores)  # seeds are different worlds


def refuse(*_):
    raise AssertionError("something is trained")


def test_a_second_study_trains_nothing(studied, monkeypatch, capsys):
    study, trials = studied
    monkeypatch.setattr(ablation.study, "run_trial", refuse)
    again = Study(seeds=2, output=study.output).collect(list(trials))
    for arm, trial in itertools.product(again, range(2)):
        np.testing.assert_array_equal(
            again[arm][trial].scores["global half"], trials[arm][trial].scores["global half"]
        )
    assert "of commit" not in capsys.readouterr().err
    monkeypatch.setattr(ablation.study, "versions", lambda: {"commit": "today"})
    Study(seeds=2, output=study.output).collect(list(trials))
    made = trials[FSENET][0].about["versions"]["commit"]
    said = f"some trials in {study.place.folder} are of commit {made}: delete them to run them"
    assert said in capsys.readouterr().err
    with pytest.raises(AssertionError, match="trained"):  # other options, other trials
        Study(seeds=1, steps=3, output=study.output).collect([FSENET])


def test_a_table_is_printed_and_written(studied, tmp_path, capsys):
    study, trials = studied
    found = study.judged(7, trials)
    assert found["versions"]["commit"] == [trials[FSENET][0].about["versions"]["commit"]]
    print_table(found)
    printed = capsys.readouterr().out
    assert "accuracy 99.67, MegaFace(C) Id. 97.53" in printed
    assert "of the paper's 1 directions" in printed
    alone = Study(seeds=1, output=study.output)
    print_table(alone.judged(7, {arm: seeds[:1] for arm, seeds in trials.items()}))
    told = capsys.readouterr().out
    assert "one seed shows no direction: its intervals are those of its pairs" in told
    assert "directions" not in told
    assert "7, global against global + local; procedural, 1 seed, 2 steps" in told
    assert printed.count("the paper contradicts itself") == 5
    assert "97.53 (table 7, global), 95.03 (table 8, global)" in printed
    written = write_evidence(found, tmp_path)
    assert written.name == "table7-procedural.json"
    assert json.loads(written.read_text())["rows"][0]["name"] == "global"
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_shows_no_direction():
    claim = {"first": "a", "second": "b", "of_the_paper": True, "verdict": "better"}
    claim |= {"interval95": [0.01, 0.03], "difference": 0.02, "p_value_over_pairs": 0.1}
    claim |= {"pairs": 600, "by_seed": [0.02]}
    numbers = "(+2.00 points, +1.00 to +3.00; over 600 pairs p = 0.1)"
    assert claim_text(claim) == f"a against b: higher on these pairs {numbers}"
    below = claim_text({**claim, "verdict": "worse"})
    assert below == f"a against b: lower on these pairs {numbers}"
    several = claim_text({**claim, "by_seed": [0.01, 0.03]})
    assert several == f"a against b: the paper's direction {numbers}"
    rows = [
        {"name": "a", "by_seed": {"accuracy": seeds}, "over_seeds": {"accuracy": over._asdict()}}
        for seeds, over in (((0.5,), spread([0.5])), ((0.5, 0.7), spread([0.5, 0.7])))
    ]
    table = {"data": "procedural", "evidence": False}
    accuracy = importlib.import_module("benchmarks.accuracy")
    for seeds, row in enumerate(rows, 1):
        (axes,) = accuracy.draw([{**table, "seeds": seeds, "rows": [row]}]).axes
        assert axes.get_title().startswith(f"drawn faces, {seeds} seed{'s' * (seeds > 1)}: runs")
        assert ("interval" in axes.get_xlabel()) == (seeds > 1)
    plt.close("all")


def test_the_headline_benchmark_takes_these_trials(studied, tmp_path, monkeypatch, capsys):
    study, _ = studied
    accuracy = importlib.import_module("benchmarks.accuracy")
    monkeypatch.setattr(ablation.study, "run_trial", refuse)
    accuracy.main(accuracy.Arguments(seeds=2, trials=study.output, output=tmp_path))
    (table,) = json.loads((tmp_path / "accuracy.json").read_text())["tables"]
    assert len(table["claims"]) == 8
    assert "global + local against control: uniform maps" in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_evidence():
    """`python docs/evidence.py` writes it."""
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "evidence.py"))
    text = (docs / "evidence.md").read_text()
    for lines in page["blocks"]().values():
        assert "\n".join(lines) in text


def test_all_contradictions_of_the_paper_are_on_the_page():
    page = (Path(__file__).parents[2] / "docs/evidence.md").read_text()
    _, _, section = page.partition("## Where the paper contradicts itself")
    lines = section.splitlines()
    for conflict in read_paper()["conflicts"]:
        (line,) = (line for line in lines if conflict["says"] in line)
        for cell in conflict["cells"]:
            table, row, measure = cell.split("/")
            number = SECOND_TRANSCRIPTION.get((table, row, measure))
            assert ("not transcribed" if number is None else f"{number:,.10g}") in line
            assert f"{table}, {row}" in line
            assert measure in line
        assert page.count(conflict["says"]) == 1
    assert "IJB-B TAR@1e-4 0.945 (table 3, FSENet), 94.35 (elsewhere, FSENet)" in section
    assert "YTF 98.02 (table 1, ArcFace), 97.89 (table 1, FSENet)" in section
    assert len([line for line in lines if line.startswith("- ")]) == 10


def test_times(parser, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation.timing, "BATCH", 5)
    times = time_arms(SMALL, parser, Workplace(tmp_path, torch.device("cpu")), 20, rounds=2)
    assert {name: found["pictures"] for name, found in times.items()} == {
        "without parsing": 20,
        "without hourglass": 20,
        "FSENet": 20,
    }
    assert times["FSENet"]["milliseconds"] > times["without hourglass"]["milliseconds"]


def test_times_are_printed_and_drawn(tmp_path, capsys):
    row = {"name": "FSENet", "milliseconds": 5.0, "seconds": 60.0, "pictures": 12000, "paper": {}}
    found = {"table": 14, "title": "time", "data": "procedural", "evidence": True}
    found |= {"backbone": "net", "threads": 2, "precision": "fp32", "times": [row]}
    print_times({**found, "conflicts": ["a conflict"]})
    assert "the paper contradicts itself: a conflict" in capsys.readouterr().out
    written = write_evidence(found, tmp_path)
    assert written.name == "table14-procedural.json"
    assert written.with_suffix(".png").exists()


def test_in_paper():
    assert in_paper({}) == "not transcribed"
    assert in_paper({"LFW": 99.5, "YTF": 97.0}) == "LFW 99.5, YTF 97"


def test_errors(parser, tmp_path, lfw_like):
    with pytest.raises(ValueError, match="--data lfw needs --faces"):
        Study("lfw").check()
    with pytest.raises(ValueError, match="--faces is for --data lfw"):
        Study("procedural", "somewhere").check()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Study("lfw", Path("nowhere")).check()
    with pytest.raises(ValueError, match="--seeds must be between"):
        Study(seeds=0).check()
    with pytest.raises(ValueError, match="--seeds must be at most 5 with LFW's ten folds; got 6"):
        Study("lfw", lfw_like(tmp_path / "lfw.zip"), seeds=6).check()
    with pytest.raises(ValueError, match="landmarks must be a ParsingNet"):
        build_network(Arm(kind="landmarks"), SMALL, parser)


def test_options_of_the_arms_reach_the_network(parser):
    arm = Arm(parts=("nose", "hair"), map_size=14, local=LocalOptions(correlation=False))
    net = build_network(arm, SMALL, parser)
    assert (net.parts, net.backbone.map_size) == (("nose", "hair"), (14, 14))
    assert net.local_dim == 2 * 64
