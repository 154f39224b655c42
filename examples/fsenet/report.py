"""Turn the folder of a training run into one page that needs nothing else.

    python examples/fsenet/report.py RUN_FOLDER

train.py does it at the end of every run. The page holds its pictures, figures and style itself,
runs no script, and loads nothing.
"""

import os
import sys
from html import escape
from pathlib import Path

from reporting import sections
from reporting.faces import compared_pairs, parsed_faces
from reporting.inputs import Run, read_run
from reporting.training import details, training


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Args:
        folder: holds metrics.json, history.jsonl, scores.npz and faces.npz.

    Raises:
        FileNotFoundError: the folder or one of those files is missing.
        ValueError: one of them is damaged; the message is one line and names it.
    """
    page = build_page(read_run(folder))
    target = folder / "report.html"
    unfinished = folder / f".report.{os.getpid()}.html"
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def build_page(run: Run) -> str:
    """Return the whole page; sections whose numbers a run lacks are left out."""
    chapters = [
        ("summary", "Result", sections.summary(run)),
        ("controls", "Do the maps matter?", sections.controls(run)),
        ("verification", "Verification", sections.verification(run)),
        ("faces", "Faces and parts", parsed_faces(run)),
        ("pairs", "Similarity by part", compared_pairs(run)),
        ("energy", "Energy shares", sections.energy(run)),
        ("parser", "Parser", sections.parser(run)),
        ("shortcuts", "Shortcuts", sections.shortcuts(run)),
        ("training", "Training", training(run)),
        ("details", "To run it again", details(run)),
    ]
    measured = {
        "controls": any(sections.CONTROL in arm for arm in run.metrics["arms"]),
        "energy": bool(run.table("energy")),
        "parser": bool(run.table("parser").get("f1")),
        "shortcuts": bool(run.table("shortcuts")),
    }
    chapters = [chapter for chapter in chapters if measured.get(chapter[0], True)]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in chapters)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
        f"{content}</section>"
        for key, title, content in chapters
    )
    style = (Path(__file__).parent / "reporting/report.css").read_text(encoding="utf-8")
    title = f"FSENet on {_faces_of(run)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A browser that obeys this cannot load or run anything the page does not hold.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>'
        f'<body><header><h1>{title}</h1><p class="lead">{_subtitle(run)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main></body>'
        "</html>\n"
    )


def _faces_of(run: Run) -> str:
    name = str(run.table("protocol").get("name", "unknown faces"))
    return {"procedural": "drawn faces", "lfw": "LFW, folds 8 and 9"}.get(name, escape(name))


def _subtitle(run: Run) -> str:
    versions = run.table("versions")
    words = ["A network with part features, and one without, trained alike."]
    known = [f"{key} {versions[key]}" for key in ("partlocal", "torch", "timm") if key in versions]
    if "commit" in versions:
        known.append(f"commit {str(versions['commit'])[:10]}")
    if known:
        words.append(f"{', '.join(known)}.")
    return escape(" ".join(words))


def main(arguments: list[str]) -> int:
    """Run the command line; errors take one line."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python examples/fsenet/report.py RUN_FOLDER", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0])))
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
