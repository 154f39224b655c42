"""Describe drawn faces part by part with any timm backbone; on a CPU, in seconds.

    python examples/quickstart.py                    # resnet18 with random weights
    python examples/quickstart.py convnext_atto      # any model of docs/backbones.md

Writes the picture of the README, docs/parts.png: faces, parsed labels, and the six part maps.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from partlocal import ParsingNet, PartLocalNet
from partlocal.labels import FSENET_PARTS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "fsenet"))  # where the recipe draws its faces
from data.face_params import NuisanceRanges  # noqa: E402
from data.procedural import PALETTE, render_many  # noqa: E402

TILE = 140  # pixels of a square of the picture; a multiple of the maps' 28 cells

# Four people with nothing before their eyes, drawn from a seed.
ranges = NuisanceRanges(glasses=0, hat=0, occluder=0, low_resolution=0, blur=0, exposure=0.1)
faces = render_many(0, identities=(9, 11, 13, 18), samples=(0, 0, 0, 0), ranges=ranges).image
images = torch.from_numpy(faces).permute(0, 3, 1, 2)  # uint8: each network normalises for itself

backbone = sys.argv[1] if len(sys.argv) > 1 else "resnet18"
parser = ParsingNet.pretrained().freeze()
net = PartLocalNet(backbone, parser, FSENET_PARTS, map_size=28).eval()
with torch.no_grad():
    found = net.forward_parts(images)
    labels = parser(images).argmax(1).numpy()

print(f"{backbone}: {found.parts.shape[2]} channels at {net.backbone.map_size}, ", end="")
print(f"descriptor of {found.descriptor.shape[1]} numbers\n\n{'part':<12} visibility  mass (cells)")
for part, seen, mass in zip(net.parts, found.visibility.mean(0), found.mass.mean(0), strict=True):
    print(f"{part:<12} {seen:10.3f} {mass:13.1f}")
for eye in ("left_eye", "right_eye"):
    seen = found.visibility[:, net.parts.index(eye)]
    assert (seen > 0.5).all(), f"{eye} not found: visibility {seen.tolist()}"

titles = ("picture", "labels", *(part.replace("_", " ") for part in net.parts))
sheet = Image.new("RGB", (TILE * len(titles), 20 + TILE * len(faces)), "white")
draw = ImageDraw.Draw(sheet)
for column, title in enumerate(titles):
    draw.text((column * TILE + 6, 4), title, "black")
for row, (face, label, maps) in enumerate(zip(faces, labels, found.maps.numpy(), strict=True)):
    coloured = Image.fromarray(PALETTE[label]).resize((112, 112), Image.Resampling.NEAREST)
    tiles = [face, (0.45 * face + 0.55 * np.asarray(coloured)).astype(np.uint8)]
    tiles += [(255 * np.clip(m, 0, 1)).astype(np.uint8) for m in maps]
    for column, tile in enumerate(tiles):
        smooth = Image.Resampling.BICUBIC if column == 0 else Image.Resampling.NEAREST
        square = Image.fromarray(tile).convert("RGB").resize((TILE - 2, TILE - 2), smooth)
        sheet.paste(square, (column * TILE, 20 + row * TILE))
sheet.save(sys.argv[2] if len(sys.argv) > 2 else ROOT / "docs" / "parts.png")
