"""The lists of MegaFace's devkit: JSON of paths and ids, and texts of wrong pictures."""

import json
from typing import Any

from protocols.lists import ListFiles, listing

DISTRACTORS = "megaface_features_list.json_"  # and their number, and that of the set


class MegafaceLists(ListFiles):
    """The lists of the devkit, wherever they lie in a folder, zip or tar."""

    def of_distractors(self, size: int, number: int) -> str:
        """Return what a list of distractors is called.

        Raises:
            FileNotFoundError: there are others, and not this one.
        """
        file = f"{DISTRACTORS}{size}_{number}"
        names = (place.rpartition("/")[2] for place in self.source.names)
        there = sorted({name for name in names if name.startswith(DISTRACTORS)})
        if there and file not in there:
            raise FileNotFoundError(
                f"{self.source.path} holds no {file}: name with --megaface.distractors and "
                f"--megaface.distractor-set a list that it holds: {listing(there)}"
            )
        return file

    def paths(self, file: str) -> tuple[tuple[str, ...], list[Any]]:
        """Return the pictures of a list, and the ids that stand beside them, if any do.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is not as it should be.
        """
        try:
            content = json.loads(self.read(file))
            paths, who = content["path"], content.get("id", [])
            plain = all(isinstance(path, str) for path in paths)
            plain &= all(isinstance(x, str | int) for x in who) and len({type(x) for x in who}) < 2
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.source.path}: {file} has no list 'path' ({error})") from None
        if not plain or not paths or len(who) not in (0, len(paths)):
            raise ValueError(
                f"{self.source.path}: {file} must hold texts in 'path', and in 'id' as many of "
                "one kind, or none"
            )
        if unsafe := [path for path in paths if ".." in path.split("/") or path.startswith("/")]:
            raise ValueError(f"{self.source.path}: {file} leads out of its folder: {unsafe[0]!r}")
        if len(set(paths)) < len(paths):
            raise ValueError(f"{self.source.path}: {file} names a picture twice")
        return tuple(paths), who

    def noises(self, file: str) -> frozenset[str]:
        """Return the pictures that a list calls wrong; none where it is not there."""
        if file not in self:
            return frozenset()
        lines = self.text(file).splitlines()
        return frozenset(x.split("\t")[-1].strip() for x in lines if x[:1] != "#" and x.strip())
