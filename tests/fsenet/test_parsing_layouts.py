"""Readers of Helen, LaPa, CelebAMask-HQ and iBugMask, on drawn faces in the layouts of the sets.

Each writer below makes the files that the set hands out, so that a reader can be tried without it.
"""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from data.archives import DamagedImage
from data.parsing_alignment import align_pair, aligned_pairs, points_from_labels
from data.parsing_layouts import _CELEBA_PARTS, CelebAMaskHQ, Helen, open_parsing_set
from data.parsing_sets import LabelledPairs, ParsingPair
from data.procedural import render
from PIL import Image

from partlocal.alignment import ARCFACE_TEMPLATE
from partlocal.labels import CELEBAMASK_HQ, CELEBAMASK_HQ_FARL, HELEN, IBUGMASK_14

WIDTH, HEIGHT = 240, 260
MASKS = {  # as the files of CelebAMask-HQ are called
    **{"skin": "skin", "nose": "nose", "l_eye": "left_eye", "r_eye": "right_eye"},
    **{"l_brow": "left_brow", "r_brow": "right_brow", "mouth": "inner_mouth"},
    **{"u_lip": "upper_lip", "l_lip": "lower_lip", "hair": "hair"},
}


def scene(number):
    """A face somewhere in a picture: image, HELEN's labels, five points from the corner."""
    face = render(3, number, 0, 160)
    turn = 0.4 * (number % 3 - 1)
    cos, sin = np.cos(turn), np.sin(turn)
    forward = np.array([[cos, -sin, 40 + 60 * (sin > 0)], [sin, cos, 70 - 50 * (sin > 0)]])
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2].ravel().tolist()

    def place(array, how):
        image = Image.fromarray(array)
        return np.array(image.transform((WIDTH, HEIGHT), Image.Transform.AFFINE, inverse, how))

    image = place(face.image, Image.Resampling.BILINEAR)
    labels = place(face.labels, Image.Resampling.NEAREST)
    points = (face.points5 + 0.5) @ forward[:, :2].T + forward[:, 2]
    return image, labels, points


SCENES = [scene(number) for number in range(4)]
SPLITS = {0: "train", 1: "train", 2: "val", 3: "test"}


def encode(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, quality=95)
    return buffer.getvalue()


def helen():
    """Probabilities that fall off over three pixels at the border of a part."""
    files = {}
    for list_, split in (("exemplars", "train"), ("tuning", "val"), ("testing", "test")):
        own = [number for number in SPLITS if SPLITS[number] == split]
        lines = [f"{order + 1} , face_{number}" for order, number in enumerate(own)]
        files[f"{list_}.txt"] = "\r\n".join(lines).encode()
    for number, (image, labels, _) in enumerate(SCENES):
        files[f"images/face_{number}.jpg"] = encode(image, "JPEG")
        for label in range(11):
            one = torch.from_numpy(labels == label).float()[None]
            soft = torch.nn.functional.avg_pool2d(one, 3, 1, 1, count_include_pad=False)[0]
            name = f"labels/face_{number}/face_{number}_lbl{label:02}.png"
            files[name] = encode((200 * soft).byte().numpy())  # they need not sum up to 255
    return files


def lapa():
    """All 106 points in the middle but those of eyes, nose and mouth."""
    files = {}
    for number, (image, labels, five) in enumerate(SCENES):
        points = np.full((106, 2), [WIDTH / 2, HEIGHT / 2])
        ring = 4 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1)
        points[66:74], points[75:83] = five[0] + ring, five[1] + ring
        points[[74, 83, 54, 84, 90]] = five
        text = "106\n" + "".join(f"{x - 0.5:.3f} {y - 0.5:.3f}\n" for x, y in points)
        folder = SPLITS[number]
        files[f"{folder}/images/face_{number}.jpg"] = encode(image, "JPEG")
        files[f"{folder}/labels/face_{number}.png"] = encode(labels)
        files[f"{folder}/landmarks/face_{number}.txt"] = text.encode()
    return files


def celebamask():
    """Pictures of twice the masks' size; the mask of the skin lies under all other parts."""
    lines = ["idx          orig_idx      orig_file"]
    files = {}
    for number, (image, labels, _) in enumerate(SCENES):
        original = {"train": 162_770, "val": 162_771, "test": 182_638}[SPLITS[number]]
        idx = number + 1999  # whose masks lie in folders 0 and 1
        lines.append(f"{idx}     {original}     {original + 1:06}.jpg")
        large = Image.fromarray(image).resize((2 * WIDTH, 2 * HEIGHT))
        files[f"CelebA-HQ-img/{idx}.jpg"] = encode(np.array(large), "JPEG")
        for part, name in MASKS.items():
            mask = labels == HELEN.index(name)
            if part == "skin":
                mask = (labels > 0) & (labels < 10)
            if mask.any():
                rgb = np.repeat(255 * mask[..., None].astype(np.uint8), 3, 2)
                folder = f"CelebAMask-HQ-mask-anno/{idx // 2000}"
                files[f"{folder}/{idx:05}_{part}.png"] = encode(rgb)
    files["CelebA-HQ-to-CelebA-mapping.txt"] = "\n".join(lines).encode()
    return files


def ibugmask():
    files = {}
    for number, (image, labels, _) in enumerate(SCENES):
        folder = SPLITS[number].replace("val", "train")
        files[f"{folder}/face_{number}.jpg"] = encode(image, "JPEG")
        files[f"{folder}/face_{number}.png"] = encode(labels)
    return files


def merged(label_set=CELEBAMASK_HQ_FARL):
    files = {}
    for number, (image, labels, _) in enumerate(SCENES):
        table = HELEN.remap(label_set).argmax(0).byte().numpy()
        files[f"images/{SPLITS[number]}_{number}.jpg"] = encode(image, "JPEG")
        files[f"labels/{SPLITS[number]}_{number}.png"] = encode(table[labels])
    return files


SETS = {
    "helen": helen(),
    "lapa": lapa(),
    "celebamask-hq": celebamask(),
    "celebamask-hq-farl": merged(),
    "ibugmask": ibugmask(),
}


def pack(path, files, around=""):
    """Write a folder, a zip or a tar."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(around + name, data)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(around + name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / around / name).parent.mkdir(parents=True, exist_ok=True)
            (path / around / name).write_bytes(data)
    return path


@pytest.mark.parametrize("form", ["folder", "set.zip", "set.tar"])
@pytest.mark.parametrize("kind", SETS)
def test_example(kind, form, tmp_path):
    """Every layout from every container: each split, the picture, and the labels drawn."""
    path = pack(tmp_path / form, SETS[kind], around="data set/")
    everything = open_parsing_set(f"{path}:{kind}")
    assert len(everything) == 4
    sizes = {"train": 2, "val": 1, "test": 1}
    if kind == "ibugmask":
        sizes = {"train": 3, "test": 1}
    for split, size in sizes.items():
        assert len(open_parsing_set(f"{path}:{kind}:{split}")) == size
    assert len(open_parsing_set(f"{path}:{kind}:train,test")) == sizes["train"] + 1

    (pair,) = open_parsing_set(f"{path}:{kind}:test")
    image, labels, points = SCENES[3]
    assert np.abs(pair.image.astype(int) - image).mean() < 8  # JPEG
    found = pair.target.argmax(0) if pair.target.ndim == 3 else pair.target
    own = everything.vocabulary.labels
    true = HELEN.remap(own).argmax(0).numpy()[labels]
    assert (found == true).mean() > (0.98 if kind == "helen" else 0.99999)
    if kind == "lapa":
        np.testing.assert_allclose(pair.points, points, atol=1e-2)
    else:
        assert pair.points is None


def test_helen_probabilities(tmp_path):
    pairs = Helen(pack(tmp_path / "set.zip", helen()))
    target = pairs[0].target
    np.testing.assert_allclose(target.sum(0), 1, atol=1e-5)
    assert 0.01 < ((target > 0.05) & (target < 0.95)).any(0).mean() < 0.3
    aligned = aligned_pairs(pairs, progress=False)
    assert aligned.targets.shape == (4, 11, 112, 112)
    assert aligned.targets.dtype == torch.uint8
    assert (aligned.targets.sum(1) - 255).abs().max() < 8


def test_celebamask_order():
    """The official script writes the masks in this order; a later one covers an earlier one."""
    order = "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat"
    order += " ear_r neck_l neck cloth"
    expected = "skin nose glasses left_eye right_eye left_brow right_brow left_ear right_ear"
    expected += " inner_mouth upper_lip lower_lip hair hat earring necklace neck clothes"
    assert CELEBAMASK_HQ.labels == ("background", *expected.split())
    assert [_CELEBA_PARTS[part] for part in order.split()] == expected.split()


def test_masks_overlap(tmp_path):
    files = celebamask()
    everywhere = encode(np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    files["CelebAMask-HQ-mask-anno/1/02000_neck.png"] = everywhere
    pairs = CelebAMaskHQ(pack(tmp_path / "set.zip", files), ["train"])
    assert set(np.unique(pairs[pairs.names.index("2000")].target)) == {CELEBAMASK_HQ.index("neck")}


@pytest.mark.parametrize("kind", SETS)
def test_alignment(kind, tmp_path):
    """Whatever the files, faces come to lie where the scene says that they should."""
    pairs = open_parsing_set(f"{pack(tmp_path / 'set.zip', SETS[kind])}:{kind}")
    aligned = aligned_pairs(pairs, progress=False)
    assert len(aligned) == 4
    own = pairs.vocabulary.labels
    for name, target in zip(aligned.names, aligned.targets.numpy(), strict=True):
        image, labels, points = SCENES[
            int(name[-1]) if kind != "celebamask-hq" else int(name) - 1999
        ]
        points = points if kind == "lapa" else None
        found = target.argmax(0).astype(np.uint8) if target.ndim == 3 else target
        eyes = points_from_labels(found, own)[:2]
        _, expected = align_pair(ParsingPair(image, labels, points), HELEN)
        assert np.abs(eyes - points_from_labels(expected, HELEN)[:2]).max() < 0.5
        assert np.linalg.norm(eyes - np.array(ARCFACE_TEMPLATE[:2]), axis=1).max() < 5


def test_both_crops_agree():
    """Cut out as recognition does it, by points, or by the label map: eyes within three pixels."""
    for image, labels, points in (scene(number) for number in range(12)):
        by_points = align_pair(ParsingPair(image, labels, points), HELEN)
        by_labels = align_pair(ParsingPair(image, labels), HELEN)
        first, second = (points_from_labels(map_, HELEN) for _, map_ in (by_points, by_labels))
        assert np.linalg.norm(first[:2] - second[:2], axis=1).max() < 3
        assert not np.array_equal(by_points[1], by_labels[1])


def test_ibugmask_14(tmp_path):
    files = ibugmask()
    labels = SCENES[0][1].copy()
    labels[:9] = IBUGMASK_14.index("glasses")
    files["train/face_0.png"] = encode(labels)
    path = pack(tmp_path / "set.tar", files)
    pairs = open_parsing_set(f"{path}:ibugmask-14:train")
    assert np.array_equal(pairs[0].target, labels)
    with pytest.raises(DamagedImage, match="holds label 13: iBugMask has 0 to 10"):
        open_parsing_set(f"{path}:ibugmask:train")[0]


def bomb():
    """A PNG whose header promises 60000 x 60000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


SMALL = np.zeros((9, 9, 3), np.uint8)
DAMAGE = [
    ("helen", "labels/face_0/face_0_lbl03.png", b"", "face_0_lbl03.png is no picture"),
    ("helen", "labels/face_0/face_0_lbl03.png", bomb(), "face_0_lbl03.png is refused"),
    ("helen", "labels/face_0/face_0_lbl03.png", encode(SMALL[..., 0]), "another size"),
    (
        "helen",
        "images/face_0.jpg",
        encode(SMALL),
        "the picture is 9x9, its",
    ),
    ("helen", "labels/face_0/face_0_lbl03.png", encode(SMALL), "mode RGB"),
    ("lapa", "train/landmarks/face_0.txt", b"106\n1 2\n", "expected 106 and 106 landmarks; got 1"),
    ("lapa", "train/landmarks/face_0.txt", b"", "its landmarks are no numbers"),
    ("lapa", "train/landmarks/face_0.txt", b"\xff\x00", "its landmarks are no numbers"),
    ("lapa", "train/landmarks/face_0.txt", b"106" + b" 1e999" * 212, "expected 106 and"),
    ("lapa", "train/landmarks/face_0.txt", b"106" + b" 5" * 212, "landmarks lie in one place"),
    ("lapa", "train/labels/face_0.png", bomb(), "labels/face_0.png is refused"),
    ("lapa", "train/labels/face_0.png", encode(SCENES[0][1] + 20), "holds label 20: LaPa has 0"),
    ("celebamask-hq", "CelebAMask-HQ-mask-anno/0/01999_nose.png", b"GIF89a", "nose.png is no pict"),
    ("celebamask-hq", "CelebAMask-HQ-mask-anno/0/01999_nose.png", bomb(), "nose.png is refused"),
    (
        *("celebamask-hq", "CelebAMask-HQ-mask-anno/0/01999_nose.png"),
        *(encode(SMALL), "another size than the masks before"),
    ),
    ("celebamask-hq", "CelebA-HQ-img/1999.jpg", encode(SCENES[0][0][:50]), "the picture is 240x50"),
    ("ibugmask", "train/face_0.png", encode(SCENES[0][1])[:900], "train/face_0.png is damaged"),
]


@pytest.mark.parametrize(("kind", "file", "data", "text"), DAMAGE)
def test_damaged(kind, file, data, text, tmp_path):
    """The file is named; the set can be used without it, if one asks for that."""
    path = pack(tmp_path / "set.zip", {**SETS[kind], file: data})
    pairs = open_parsing_set(f"{path}:{kind}")
    with pytest.raises(DamagedImage, match=text):
        pairs[next(i for i, name in enumerate(pairs.names) if name.endswith(("face_0", "1999")))]
    with pytest.raises(ValueError, match=r"\(1 damaged, and --damaged allows 0\)"):
        aligned_pairs(pairs, progress=False)
    aligned = aligned_pairs(pairs, damaged=1, progress=False)
    assert len(aligned) == 3
    assert text in aligned.lost[0]


def test_missing_files(tmp_path):
    def without(kind, *names):
        files = {name: data for name, data in SETS[kind].items() if name not in names}
        return pack(tmp_path / f"{kind}-{len(files)}-{abs(hash(names))}.zip", files)

    name = "labels/face_0/face_0_lbl03.png"
    with pytest.raises(ValueError, match=rf"lacks 1 of the \d+ files that its lists name: {name}$"):
        open_parsing_set(f"{without('helen', name)}:helen")
    with pytest.raises(ValueError, match=rf"lacks 2 .* name: images/face_0.jpg, {name}$"):
        open_parsing_set(f"{without('helen', name, 'images/face_0.jpg')}:helen")
    # a split whose list is not there is no split
    with pytest.raises(ValueError, match=r"holds no split 'val'; it holds test, train$"):
        open_parsing_set(f"{without('helen', 'tuning.txt')}:helen:val")
    with pytest.raises(ValueError, match=r"have no landmarks of the same name: \S*face_1.jpg$"):
        open_parsing_set(f"{without('lapa', 'train/landmarks/face_1.txt')}:lapa")
    both = without("lapa", *(f"train/landmarks/face_{number}.txt" for number in range(2)))
    with pytest.raises(ValueError, match=r"2 of \d+ files .* name: \S*face_0.jpg, \S*face_1.jpg$"):
        open_parsing_set(f"{both}:lapa")
    with pytest.raises(ValueError, match=r"have no label map of the same name: \S*face_1.jpg$"):
        open_parsing_set(f"{without('ibugmask', 'train/face_1.png')}:ibugmask")
    with pytest.raises(ValueError, match=r"have no picture of the same name: \S*01999_.*png$"):
        open_parsing_set(f"{without('celebamask-hq', 'CelebA-HQ-img/1999.jpg')}:celebamask-hq")
    mapping = "CelebA-HQ-to-CelebA-mapping.txt"
    assert len(open_parsing_set(f"{without('celebamask-hq', mapping)}:celebamask-hq")) == 4
    with pytest.raises(ValueError, match="holds no split 'train'"):
        open_parsing_set(f"{without('celebamask-hq', mapping)}:celebamask-hq:train")
    broken = pack(tmp_path / "broken.zip", {**SETS["celebamask-hq"], mapping: b"idx\n1 x y\n"})
    with pytest.raises(ValueError, match="line 2: expected two numbers and a name; got '1 x y'"):
        open_parsing_set(f"{broken}:celebamask-hq")
    for kind in SETS:
        with pytest.raises(ValueError, match="holds no pairs "):
            open_parsing_set(f"{pack(tmp_path / f'empty-{kind}.zip', {'readme': b''})}:{kind}")


def test_traversal(tmp_path):
    for name in ("../images/a.jpg", "images/../../a.jpg", "/images/a.jpg", "C:/images/a.jpg"):
        path = tmp_path / f"{abs(hash(name))}.zip"
        with pytest.raises(ValueError, match="holds the unsafe name"):
            open_parsing_set(f"{pack(path, {name: b''})}:lapa")
    # names in a list are names in the archive and nothing else
    files = {**helen(), "testing.txt": b"1 , ../../etc/passwd\n"}
    with pytest.raises(ValueError, match=r"lacks 12 .* lists name: images/../../etc/passwd.jpg, "):
        open_parsing_set(f"{pack(tmp_path / 'list.zip', files)}:helen")


def test_choices(tmp_path):
    path = pack(tmp_path / "a:b.zip", merged())
    pairs = open_parsing_set(f"{path}:celebamask-hq-farl:train,val")
    assert pairs.title == "a:b.zip:CelebAMask-HQ (FaRL order):train:val"
    assert type(open_parsing_set(f"{path}:celebamask-hq-farl:")) is LabelledPairs
    for wrong in ("set.zip", "set.zip:train", "", ":", "fasseg"):
        with pytest.raises(ValueError, match="a parsing set is written PATH:KIND:SPLITS, "):
            open_parsing_set(wrong)
    with pytest.raises(ValueError, match=r"kind must be one of fasseg, helen, .*; got 'faces'$"):
        open_parsing_set(f"{path}:faces:train")
    with pytest.raises(FileNotFoundError, match=r"nowhere.zip does not exist"):
        open_parsing_set("nowhere.zip:helen")
