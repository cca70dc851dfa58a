"""Free photographs from Debian packages, as folders of images: what the benchmarks on public weights are fed with.

The packages are fetched by `apt-get download` and unpacked into the cache, nothing is installed. A source is one
photograph or one cut-out object; near-copies of one picture are one source. Sources are split before views of them
(crops, flips, objects on backgrounds of the same part) are made, so no picture is on both sides.
"""

from __future__ import annotations

import io
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pxcompress.cache import cache_dir

PACKAGES = (
    "tuxpaint-stamps-default",
    "gcompris-qt-data",
    "gnome-backgrounds",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "ukui-wallpapers",
)
DRAWN = ("cartoon", "symbols/", "seasonal/", "town/houses", "town/flags", "spirits", "halloween", "hobbies/games")
"""Parts of paths of stamps that are drawings."""

SIDE = 320  # pixels of a view
SMALLEST = 150  # pixels: smaller pictures are buttons and icons

CLASSES: Mapping[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),
    "cattle": ("animals/mammals/bovines",),
    "clothes": ("clothes",),
    "coin": ("symbols/money/euro/coins", "symbols/money/us/coins", "symbols/money/canadian/coins"),
    "fish": ("animals/fish",),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "insect": ("animals/insects",),
    "instrument": ("hobbies/music",),
    "planet": ("space/planets", "space/moon"),
    "rodent": ("animals/mammals/rodents",),
    "sign": ("town/roadsigns",),
    "sport": ("sports",),
    "tool": ("household/tools",),
    "tree": ("plants/trees",),
    "vegetable": ("food/vegetables",),
}
"""Sixteen classes of objects, each with the folders of its stamps."""


@dataclass(frozen=True, eq=False)
class Source:
    """One picture: its name, and the picture in RGB, or RGBA where it is an object without a background."""

    name: str
    image: Image.Image

    @property
    def is_object(self) -> bool:
        """Whether the picture is cut out."""
        return self.image.mode == "RGBA"


def photograph_folder(views: int = 3, seed: int = 0) -> Path:
    """A folder with calibration/*.jpg and judge/*.jpg, made once: `views` of every source, 60 % to calibrate."""
    folder = cache_dir() / "photographs" / f"views-{views}-seed-{seed}"
    if not folder.exists():
        calibration, judge = split([*stamps(), *pictures(), *wallpapers()], 0.6, seed)
        for part, sources in (("calibration", calibration), ("judge", judge)):
            write_views(folder.with_suffix(".part") / part, sources, backgrounds(sources), views, seed)
        folder.with_suffix(".part").rename(folder)
    return folder


def class_folder(views: int = 8, seed: int = 0) -> Path:
    """A folder with train/CLASS/*.jpg and val/CLASS/*.jpg of the `CLASSES`, made once; 60 % of sources train."""
    folder = cache_dir() / "photographs" / f"classes-{views}-seed-{seed}"
    if not folder.exists():
        objects, scenes = stamps(drawn=True), split(wallpapers(), 0.6, seed)
        for label, places in CLASSES.items():
            members = [
                each
                for each in objects
                if str(Path(each.name).parent) in places
                or each.name.startswith(tuple(place + "/" for place in places if place == "hobbies/music"))
            ]
            for part, sources, behind in zip(("train", "val"), split(members, 0.6, seed), scenes, strict=True):
                write_views(folder.with_suffix(".part") / part / label, sources, behind, views, seed)
        folder.with_suffix(".part").rename(folder)
    return folder


def split(sources: Sequence[Source], share: float, seed: int) -> tuple[list[Source], list[Source]]:
    """Two parts, the first with about `share` of the sources; pictures that look alike go to one side together."""
    families: dict[bytes, list[Source]] = {}
    for source in sources:
        families.setdefault(_fingerprint(source.image), []).append(source)
    order = sorted(families)
    random.Random(seed).shuffle(order)
    first, second = order[: round(share * len(order))], order[round(share * len(order)) :]
    return [families[key][0] for key in first], [families[key][0] for key in second]


def _fingerprint(image: Image.Image) -> bytes:
    """Equal for copies of a picture in other sizes and qualities: which of 8 x 8 areas are brighter than their mean."""
    grey = np.asarray(image.convert("RGBA").resize((8, 8), Image.Resampling.BOX).convert("L"), dtype=np.float32)
    return np.packbits(grey > grey.mean()).tobytes()


def backgrounds(sources: Sequence[Source]) -> list[Source]:
    """Those of `sources` that objects may stand on."""
    return [source for source in sources if not source.is_object and min(source.image.size) >= 2 * SIDE]


def write_views(folder: Path, sources: Sequence[Source], behind: Sequence[Source], views: int, seed: int) -> None:
    """`views` of every source as JPEG files, drawn from `seed` and the source's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources):
        draw = random.Random(f"{seed} {source.name}")
        for view in range(views):
            picture = _composed(source, behind, draw) if source.is_object else _crop(source.image, draw, 0.5)
            picture.save(folder / f"{number:04d}-{view}.jpg", quality=92)


def _crop(image: Image.Image, draw: random.Random, least: float) -> Image.Image:
    """A square of at least the share `least` of the shorter side, perhaps mirrored, `SIDE` x `SIDE`."""
    side = int(min(image.size) * draw.uniform(least, 1.0))
    left, top = (draw.randint(0, size - side) for size in image.size)
    square = (
        image.convert("RGB").crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    )
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else square


def _composed(source: Source, behind: Sequence[Source], draw: random.Random) -> Image.Image:
    """An object somewhere on a background, or on a plain colour in one of three views."""
    plain = not behind or draw.random() < 1 / 3
    colour = tuple(draw.randint(90, 255) for _ in range(3))
    scene = Image.new("RGB", (SIDE, SIDE), colour) if plain else _crop(draw.choice(behind).image, draw, 0.2)
    scale = draw.uniform(0.6, 0.95) * SIDE / max(source.image.size)
    size = tuple(max(1, round(each * scale)) for each in source.image.size)
    item = source.image.resize(size, Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        item = item.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scene.paste(item, tuple(draw.randint(0, SIDE - each) for each in item.size), item)
    return scene


def stamps(*, drawn: bool = False) -> list[Source]:
    """Cut-out objects, named by their place among the stamps; without the drawings unless `drawn`."""
    root = unpacked() / "usr/share/tuxpaint/stamps"
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.png"))]
    names = [name for name in names if drawn or not any(part in name for part in DRAWN)]
    names = [name for name in names if "cartoon" not in name]
    return [Source(name, _loaded(root / name).convert("RGBA")) for name in names]


def wallpapers() -> list[Source]:
    """Backgrounds of desktops, each once, in the largest size that is there."""
    root = unpacked() / "usr/share"
    paths = [path for kind in ("backgrounds", "wallpapers") for path in sorted((root / kind).rglob("*.[jp][pn]g"))]
    largest: dict[str, Path] = {}
    for path in paths:
        key = str(path.parent) if path.parent.name.startswith("images") else str(path)
        if key not in largest or path.stat().st_size > largest[key].stat().st_size:
            largest[key] = path
    images = {key: _loaded(path).convert("RGB") for key, path in largest.items()}
    return [Source(key, image) for key, image in images.items() if min(image.size) >= 2 * SIDE]


def pictures() -> list[Source]:
    """Photographs and paintings inside the resource files of gcompris."""
    folder = unpacked() / "usr/share/gcompris-qt/rcc"
    return [
        Source(f"{path.stem}-{place}", image)
        for path in sorted(folder.glob("*.rcc"))
        for place, image in _images_inside(path.read_bytes())
    ]


def _images_inside(content: bytes) -> Iterator[tuple[int, Image.Image]]:
    """WebP images that lie one after another in a file, and where each begins."""
    place = content.find(b"RIFF")
    while place >= 0:
        size = 8 + int.from_bytes(content[place + 4 : place + 8], "little")
        if content[place + 8 : place + 12] == b"WEBP":
            image = Image.open(io.BytesIO(content[place : place + size]))
            if min(image.size) >= SMALLEST and image.mode == "RGB":
                yield place, image.copy()
        place = content.find(b"RIFF", place + 4)


def _loaded(path: Path, largest: int = 1280) -> Image.Image:
    """A picture of at most `largest` pixels a side."""
    image = Image.open(path)
    image.draft("RGB", (largest, largest))
    image.thumbnail((largest, largest))
    return image


def unpacked() -> Path:
    """Where the files of all `PACKAGES` lie; fetched once with the system's package manager."""
    root = cache_dir() / "photographs" / "packages"
    for package in PACKAGES:
        place = root / package
        if place.exists():
            continue
        part = root / f"{package}.part"
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=part, check=True, stdout=subprocess.DEVNULL)
        (archive,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, part / "root"], check=True)
        (part / "root").rename(place)
    merged = root / "all"
    if not merged.exists():
        merged.mkdir()
        for package in PACKAGES:
            subprocess.run(["cp", "-rl", f"{root / package}/.", merged], check=True)
    return merged
