"""The documentation: its code runs and prints what it says, its links and options exist."""

import contextlib
import dataclasses
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import pytest
import torch

import partlocal
from partlocal.parsing import PRETRAINED

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples/fsenet/README.md", *sorted(DOCS.rglob("*.md"))]
NOT_EXECUTED = re.compile(r"<!-- not executed: (.+) -->")


class Block(NamedTuple):
    """A fence of a page: its code, where it begins, what it prints, why it is left out."""

    code: str
    line: int
    output: str | None
    reason: str | None


def python_blocks(page: str) -> list[Block]:
    """Return the ```python fences of a page; a ```text fence right after one is its output."""
    fences = []
    lines = page.splitlines()
    opened = None
    for number, line in enumerate(lines):
        if opened is None and line.startswith("```"):
            opened = number
        elif opened is not None and line.startswith("```"):
            fences.append((lines[opened][3:].strip(), opened, number))
            opened = None
    assert opened is None, f"the fence of line {opened} is never closed"
    blocks = []
    for i, (kind, start, end) in enumerate(fences):
        if kind != "python":
            continue
        output = None
        if i + 1 < len(fences) and fences[i + 1][0] == "text":
            between = lines[end + 1 : fences[i + 1][1]]
            if not any(line.strip() for line in between):
                output = "\n".join(lines[fences[i + 1][1] + 1 : fences[i + 1][2]]).strip()
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        reason = NOT_EXECUTED.fullmatch(before.strip())
        blocks.append(
            Block("\n".join(lines[start + 1 : end]), start, output, reason and reason.group(1))
        )
    return blocks


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def one_thread():
    """The networks of the pages are small: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WITH_CODE = [page for page in PAGES if python_blocks(page.read_text(encoding="utf-8"))]


def test_blocks_are_found():
    page = "text\n```python\na = 1\n```\n\n```text\n1\n```\n<!-- not executed: why -->\n"
    page += "```python\nb\n```\n```bash\nls\n```\n"
    assert python_blocks(page) == [Block("a = 1", 1, "1", None), Block("b", 9, None, "why")]
    assert {"README.md", "docs/tutorial.md", "docs/conventions.md"} <= {*map(name, WITH_CODE)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, in order, in one namespace, in an empty folder."""
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    if not PRETRAINED.is_file() and any("ParsingNet.pretrained()" in b.code for b in blocks):
        pytest.skip("this checkout holds no parser weights")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    # Readers run without the shape checks, and see the library's own errors.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            if block.reason is not None:
                continue
            # Blank lines before it, so that a traceback names the line of the page.
            code = compile("\n" * (block.line + 1) + block.code, str(page), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            if block.output is not None:
                assert printed.getvalue().strip() == block.output, f"{name(page)}:{block.line + 1}"


def test_few_blocks_are_left_out():
    blocks = [b for page in WITH_CODE for b in python_blocks(page.read_text(encoding="utf-8"))]
    left_out = [b for b in blocks if b.reason is not None]
    assert len(left_out) <= 4
    assert len(left_out) <= len(blocks) / 5


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def options_of(script: str) -> set[str]:
    """Return the options of a script of the recipe, as its dataclass names them."""
    module = runpy.run_path(str(ROOT / "examples/fsenet" / script))
    found = set()

    def collect(cls: type, prefix: str) -> None:
        for field in dataclasses.fields(cls):
            option = prefix + field.name.replace("_", "-")
            found.add(option)
            if field.default is True:
                found.add("--no-" + option.removeprefix("--"))
            if field.default_factory is not dataclasses.MISSING:
                collect(type(field.default_factory()), option + ".")

    collect(module.get("Options") or module["Arguments"], "--")
    return found


def test_options_named_in_the_docs_exist():
    pytest.importorskip("tyro")
    known = {"--help", "--logdir"}
    known |= {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
    for script in (
        "options.py",
        "train_parser.py",
        "score_parser.py",
        "ablate.py",
        "evaluate.py",
        "extract.py",
        "data/convert.py",
        "data/procedural.py",
    ):
        known |= options_of(script)
    pages = [ROOT / "README.md", ROOT / "examples/fsenet/README.md", DOCS / "recipe.md"]
    pages += [DOCS / "paper.md", DOCS / "parser.md"]
    named = {
        (name(page), option.replace("_", "-"))
        for page in pages
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", page.read_text(encoding="utf-8"))
        if option not in ("--strict", "--upgrade")
    }
    assert len(named) > 20
    assert not {(page, option) for page, option in named if option.rstrip(".") not in known}


def test_every_module_has_a_reference_page():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: partlocal\.([\w.]+)$", pages, flags=re.M))
    package = Path(partlocal.__file__).parent
    modules = {path.stem for path in package.glob("*.py")}
    modules |= {f"evaluation.{path.stem}" for path in (package / "evaluation").glob("*.py")}
    internal = {"__init__", "evaluation.__init__", "hourglass", "numerics", "timm_models"}
    assert shown == modules - internal
    nav = (ROOT / "mkdocs.yml").read_text()
    missing = [p.name for p in DOCS.rglob("*.md") if p.relative_to(DOCS).as_posix() not in nav]
    assert not missing


def test_parser_costs_are_current():
    """Two rows of the table here; `python docs/parser_cost.py` writes them all."""
    cost = runpy.run_path(str(DOCS / "parser_cost.py"))
    page = (DOCS / "parser.md").read_text()
    for stacks, grid, label in ((1, 32, "32"), (2, 64, "64 (default)")):
        parser = partlocal.ParsingNet(num_stacks=stacks, grid=grid, device="meta")
        size = sum(p.numel() for p in parser.parameters())
        row = f"| {stacks} | {label} | {size:,} | {cost['multiply_adds'](parser):,.0f} |"
        assert row in page


@pytest.mark.slow
def test_parser_cost_table_is_current():
    cost = runpy.run_path(str(DOCS / "parser_cost.py"))
    assert cost["table"]() in (DOCS / "parser.md").read_text()


def test_doctests_of_docstrings_become_code():
    griffe = pytest.importorskip("griffe")
    assert griffe
    fence = runpy.run_path(str(DOCS / "doctest_blocks.py"))["fence_doctests"]
    assert fence("Add.\n\n>>> 1 + 1\n2\n\nMore.") == (
        "Add.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."
    )
    assert fence("Add.\n\n>>> 1") == "Add.\n\n```pycon\n>>> 1\n```"


def test_lengths():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert len((ROOT / "examples/quickstart.py").read_text().splitlines()) <= 60


def test_quickstart(tmp_path):
    if not PRETRAINED.is_file():
        pytest.skip("this checkout holds no parser weights")
    picture = tmp_path / "parts.png"
    command = [sys.executable, "examples/quickstart.py", "resnet10t", str(picture)]
    # This copy and not another that is installed; one thread, as above.
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "left_eye" in run.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "pycon" not in (tmp_path / "reference/pooling/index.html").read_text()


def test_pages_hold_what_was_measured():
    """Tables are those of the files that are kept beside the pages."""
    pytest.importorskip("tyro")
    blocks = runpy.run_path(str(DOCS / "results.py"))["blocks"]()
    tables = runpy.run_path(str(DOCS / "evidence.py"))["blocks"]()
    blocks |= {(DOCS / "evidence.md", name): lines for name, lines in tables.items()}
    assert len(blocks) == 7
    for (page, block), lines in blocks.items():
        assert "\n".join(lines) in page.read_text(encoding="utf-8"), block
