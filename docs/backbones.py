"""Survey one small model of each of timm's model modules and write docs/backbones.md.

python docs/backbones.py            # two minutes on one core
"""

import sys
import warnings
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from partlocal.backbone import Backbone

PAGE = Path(__file__).with_suffix(".md")
IMAGE_SIZE = 112

# One small model of each module (fewest parameters of those whose names promise to be small).
MODELS = {
    "beit": "beit_base_patch16_224",
    "byoanet": "eca_botnext26ts_256",
    "byobnet": "gernet_s",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_distilled_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "efficientnet_b0",
    "efficientvim": "efficientvim_m1_dist",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_s12",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "coatnet_pico_rw_224",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_xs_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1_0",
    "res2net": "res2net50_26w_4s",
    "resnest": "resnest26d",
    "resnet": "resnet18",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}


class Row(NamedTuple):
    """One module's line on the page, and whether its model works."""

    works: bool
    text: str


def survey(module: str, model: str) -> Row:
    """Build a backbone at 112 pixels and describe it, or quote the error that refuses it."""
    try:
        backbone = Backbone(model, image_size=IMAGE_SIZE)
    except ValueError as error:
        return Row(False, f"| {module} | `{model}` | {error} |")
    built = "yes" if "img_size" in backbone.architecture["args"] else ""
    maps = []
    for (height, channels), run in groupby(backbone.taps, lambda tap: (tap.height, tap.channels)):
        indices = [tap.index for tap in run]
        span = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        chosen = "**" if backbone.tap in indices else ""
        maps.append(f"{span}: {chosen}{height} / {IMAGE_SIZE / height:.3g} / {channels}{chosen}")
    return Row(
        True, f"| {module} | `{model}` | {built} | {', '.join(maps)} | {backbone.global_dim} |"
    )


def versions() -> str:
    """Name what the page's numbers depend on."""
    return f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}"


def page(rows: Iterable[Row]) -> str:
    """Lay out the page."""
    rows = list(rows)
    works = [row.text for row in rows if row.works]
    refuses = [row.text for row in rows if not row.works]
    return f"""# Which timm models work as a backbone

**{len(works)} of {len(rows)} work at {IMAGE_SIZE} x {IMAGE_SIZE}**: one small model of each of \
timm's {len(rows)} model modules, with random weights. The others refuse with the error quoted \
below, which names sizes that work.

Written by `python docs/backbones.py` with {versions()}; \
`pytest -m slow tests/test_backbone.py` runs the same models and checks what their maps hold.

A map is chosen with `tap=index` or with `map_size=cells`, which takes the last tap of that size, \
else the nearest. With neither, a quarter of the picture's side is wanted: 28 at {IMAGE_SIZE}, \
as in FSENet. Plain vision transformers have one size of map, 7 or 8 at {IMAGE_SIZE}: pool over \
that grid, with part maps brought to it, or use a larger `image_size`.

```python
from partlocal.backbone import Backbone

backbone = Backbone("resnet18", map_size=14, image_size={IMAGE_SIZE})
backbone.tap, backbone.map_size, backbone.feature_channels  # 2, (14, 14), 128
```

## Models that work at {IMAGE_SIZE}

Maps are written as tap: **side / stride / channels**, all measured in a forward pass, the \
default one in bold; an index range stands for taps of the same shape (its last is \
the one chosen). Strides are pixels a cell at {IMAGE_SIZE} and differ from the nominal ones \
where a model rounds. "img_size" says that the model was built for {IMAGE_SIZE} pixels, which \
`Backbone` does by itself where timm allows it; most models so built take that size alone.

| module | model | img_size | tap: side / stride / channels | global width |
|---|---|---|---|---|
{chr(10).join(works)}

## Models that refuse {IMAGE_SIZE}

| module | model | error |
|---|---|---|
{chr(10).join(refuses)}
"""


def main() -> None:
    """Survey every module and write the page."""
    missing = sorted(set(timm.list_modules()) - set(MODELS))
    if missing:
        sys.exit(f"timm {timm.__version__} has modules with no model in MODELS: {missing}")
    warnings.simplefilter("ignore")
    rows = []
    for done, (module, model) in enumerate(MODELS.items(), start=1):
        print(f"{done}/{len(MODELS)} {module}: {model}", file=sys.stderr)
        rows.append(survey(module, model))
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
