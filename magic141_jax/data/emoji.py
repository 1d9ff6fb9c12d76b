"""The emoji set: captioned clips composed from the pack, deterministic and without end.

A clip shows one animated subject on a plain colour, moving along a path that its caption names:
"a shark moves left on a yellow background". The canvas is a torus: what leaves on one side comes back on the other,
so that every moment of a motion is a possible first frame and a video may go on for ever.

No leak: in a video sample the start (position, size, phase of the animation) is drawn from the same distribution
for every motion, so that only the caption tells the direction. An image sample is the poster of its caption: the
subject whole, placed where its motion has room (a shark that moves left stands right of the centre).

Held out: every `TRIPLE_FOLD`-th (subject, colour, motion) triple, and the subjects that the pack marks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageSequence

from magic141_jax import embedded
from magic141_jax.errors import UserError, nearest

DEFAULT_PACK = embedded.ROOT / "datasets" / "emoji" / "emoji.zip"
TRIPLE_FOLD = 11
POSTER_STARTS = 0.4  # share of videos that start from a poster, as a first window does
CANVAS = 64  # sizes and speeds below are in pixels of a 64-pixel frame and scale with the frame

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "yellow": (250, 214, 70),
    "orange": (244, 148, 60),
    "red": (214, 64, 64),
    "pink": (246, 160, 200),
    "purple": (140, 96, 200),
    "blue": (70, 130, 226),
    "green": (88, 178, 98),
}


@dataclasses.dataclass(frozen=True)
class Motion:
    """A motion: pixels of place and of size a frame, and its words."""

    velocity: tuple[float, float]  # (y, x) pixels a frame
    growth: float  # pixels of size a frame
    words: tuple[str, ...]


SPEED = 1.0
GROWTH = 0.75
PACE = 0.125  # frames of a subject's loop to a frame of video: slow, so that the first frame decides nearly all
SIZES = (24.0, 52.0)
USUAL_SIZE = 40.0
ASIDE = 8.0  # of a poster's centre from the frame's: two places a whole number of patches apart on each axis
MOTIONS: dict[str, Motion] = {
    "left": Motion((0, -SPEED), 0, ("moves left", "goes left", "moves to the left")),
    "right": Motion((0, SPEED), 0, ("moves right", "goes right", "moves to the right")),
    "up": Motion((-SPEED, 0), 0, ("moves up", "goes up", "rises")),
    "down": Motion((SPEED, 0), 0, ("moves down", "goes down", "sinks")),
    "grows": Motion((0, 0), GROWTH, ("grows", "gets bigger", "grows and stays in place")),
    "shrinks": Motion((0, 0), -GROWTH, ("shrinks", "gets smaller", "shrinks and stays in place")),
    "still": Motion((0, 0), 0, ("stands still", "stays still", "stays in place")),
}
TEMPLATES = (
    "a {name} {motion} on a {colour} background",
    "the {name} {motion} on a {colour} background",
    "a {name} {motion}, {colour} background",
    "on a {colour} background a {name} {motion}",
)
OPEN_TEMPLATES = (  # for videos only: their first frame says what the caption doesn't
    "it {motion}",
    "{motion}",
    "it {motion} on a {colour} background",
    "a {name} {motion}",
    "the {name} {motion}",
)
OPEN_SHARE = 0.3
UNNAMED = ("thing", "picture", "subject")  # names of a subject that is drawn in another look
LOOKS = 8 * 6  # turned and mirrored, and its colour channels in another order; look 0 is the emoji itself
LOOK_SHARE = 0.5  # of the videos that don't start from a poster: many more things to move than there are emoji


@dataclasses.dataclass(frozen=True)
class Subject:
    """One emoji of the pack: its code point, its names (the first is the usual one), and whether it is held out."""

    code: str
    names: tuple[str, ...]
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that decides a clip's pixels. Position and size are in pixels of a 64-pixel frame."""

    subject: int
    colour: str
    motion: str
    centre: tuple[float, float]
    size: float
    phase: int = 0
    look: int = 0  # one of `LOOKS`


class EmojiPack:
    """The subjects and their frames, read lazily from the pack's zip."""

    def __init__(self, path: Path | str = DEFAULT_PACK):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as pack:
                lines = pack.read("emoji.jsonl").decode().splitlines()
        except FileNotFoundError:
            raise UserError(f"no emoji pack at {self.path}") from None
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"can't read the emoji pack {self.path}: {error}") from None
        rows = [json.loads(line) for line in lines]
        self.subjects = tuple(Subject(r["code"], tuple(r["names"]), r["held_out"]) for r in rows)
        self._frames: dict[int, np.ndarray] = {}

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Indices of the subjects that training may see."""
        return tuple(i for i, s in enumerate(self.subjects) if not s.held_out)

    @cached_property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the subjects that training never sees."""
        return tuple(i for i, s in enumerate(self.subjects) if s.held_out)

    def index(self, name: str) -> int:
        """The index of the subject with this name; raises `UserError` with the nearest name."""
        names = {n: i for i, s in enumerate(self.subjects) for n in s.names}
        if name not in names:
            raise UserError(f"no emoji named {name!r}.{nearest(name, names)}")
        return names[name]

    def frames(self, subject: int) -> np.ndarray:
        """The loop of one subject, uint8 RGBA (24, 96, 96, 4), colours premultiplied by alpha."""
        if subject not in self._frames:
            with (
                zipfile.ZipFile(self.path) as pack,
                Image.open(io.BytesIO(pack.read(f"{self.subjects[subject].code}.webp"))) as image,
            ):
                rgba = np.stack([np.asarray(f.convert("RGBA")) for f in ImageSequence.Iterator(image)])
            alpha = rgba[..., 3:].astype(np.uint16)
            rgba[..., :3] = (rgba[..., :3] * alpha + 127) // 255
            self._frames[subject] = rgba
        return self._frames[subject]

    def render(self, scene: Scene, *, size: int = CANVAS, num_frames: int = 17) -> np.ndarray:
        """Draws a clip, uint8 (t, y, x, 3); on a torus of `size` pixels."""
        loop = _in_look(self.frames(scene.subject), scene.look)
        motion = MOTIONS[scene.motion]
        unit = size / CANVAS
        clip = np.empty((num_frames, size, size, 3), np.uint8)
        clip[:] = COLOURS[scene.colour]
        for i in range(num_frames):
            diameter = float(np.clip(scene.size + motion.growth * i, *SIZES)) if motion.growth else scene.size
            side = max(round(diameter * unit), 2)
            picture = Image.fromarray(loop[(scene.phase + int(PACE * i)) % len(loop)], "RGBa").resize(
                (side, side), Image.Resampling.BILINEAR
            )
            rgba = np.asarray(picture).astype(np.uint16)
            y, x = (round((c + v * i) * unit - side / 2) for c, v in zip(scene.centre, motion.velocity, strict=True))
            rows, columns = np.arange(y, y + side) % size, np.arange(x, x + side) % size
            under = clip[i][np.ix_(rows, columns)]
            clip[i][np.ix_(rows, columns)] = np.minimum(rgba[..., :3] + under * (255 - rgba[..., 3:]) // 255, 255)
        return clip


def _in_look(loop: np.ndarray, look: int) -> np.ndarray:
    """A loop (t, y, x, rgba) in one of `LOOKS`."""
    turns, mirrored, order = look % 4, look // 4 % 2, look // 8
    loop = np.rot90(loop, turns, axes=(1, 2))
    channels = (*list(itertools.permutations(range(3)))[order], 3)
    return np.ascontiguousarray((loop[:, :, ::-1] if mirrored else loop)[..., channels])


def is_held_out_triple(pack: EmojiPack, scene: Scene) -> bool:
    """Whether training leaves out this (subject, colour, motion); decided by a hash, so stable under additions."""
    key = f"{pack.subjects[scene.subject].code}/{scene.colour}/{scene.motion}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % TRIPLE_FOLD == 0


def caption(
    pack: EmojiPack,
    scene: Scene,
    rng: np.random.Generator | None = None,
    *,
    templates: tuple[str, ...] = TEMPLATES,
) -> str:
    """The words for a scene: the plainest ones without `rng`, otherwise varied in name, verb and order.

    Args:
      pack: names the subjects.
      scene: what the words say. A subject in another look is not called by its name.
      rng: draws the words.
      templates: to draw from; the first is as likely as the others together.
    """
    names = UNNAMED if scene.look else pack.subjects[scene.subject].names
    words = MOTIONS[scene.motion].words
    if rng is None:
        name, word, template = names[0], words[0], templates[0]
    else:
        name = names[0] if rng.random() < 0.7 else names[rng.integers(len(names))]
        word = words[0] if rng.random() < 0.5 else words[rng.integers(len(words))]
        template = templates[0] if rng.random() < 0.5 else templates[rng.integers(len(templates))]
    text = template.format(name=name, motion=word, colour=scene.colour)
    for vowel in "aeiou":
        text = text.replace(f"a {vowel}", f"an {vowel}") if f" a {vowel}" in f" {text}" else text
    return text.replace("an uni", "a uni").replace("an ufo", "a ufo")


def poster(subject: int, colour: str, motion: str) -> Scene:
    """The opening scene of a caption: the subject whole, with room for its motion, its animation at the start."""
    centre = tuple(CANVAS / 2 + (-ASIDE if v > 0 else ASIDE) for v in MOTIONS[motion].velocity)
    return Scene(subject, colour, motion, centre, USUAL_SIZE)


def draw_scene(
    pack: EmojiPack, rng: np.random.Generator, *, kind: Literal["image", "video"], subjects: tuple[int, ...]
) -> Scene:
    """Draws a scene: a poster for images; for videos a poster, of any motion, or any place, size and moment.

    A poster stands on either side of the middle on an axis along which it won't move. Its places are whole patches of
    the transformer apart: tokens then look the same wherever it stands, so where a subject is and what it looks like
    are learned apart, which makes text to image learnable in minutes. A video that starts from a poster takes its own
    motion independently of the poster's, so nothing leaks. The others show many of their subjects in another look:
    what moves is then to be read off the first frame, not off a memory of the emoji.
    """
    subject = int(rng.choice(subjects))
    colour, motion, placed_for = str(rng.choice(list(COLOURS))), *rng.choice(list(MOTIONS), 2).tolist()
    if kind == "image" or rng.random() < POSTER_STARTS:
        place = motion if kind == "image" else placed_for
        base = poster(subject, colour, place)
        centre = tuple(
            c if v else float(rng.choice((c, CANVAS - c)))
            for c, v in zip(base.centre, MOTIONS[place].velocity, strict=True)
        )
        return dataclasses.replace(base, motion=motion, centre=centre)
    centre = (float(rng.integers(CANVAS)), float(rng.integers(CANVAS)))
    size, phase = float(rng.integers(int(SIZES[0]), int(SIZES[1]) + 1)), int(rng.integers(24))
    look = int(rng.integers(LOOKS)) if rng.random() < LOOK_SHARE else 0
    return Scene(subject, colour, motion, centre, size, phase, look)


@dataclasses.dataclass(frozen=True)
class EmojiConfig:
    """Which clips an `EmojiClips` source draws."""

    kind: Literal["image", "video"] = "video"
    split: Literal["train", "triples", "subjects"] = "train"
    size: int = CANVAS
    num_frames: int = 17
    length: int = 4096
    seed: int = 0


class EmojiClips:
    """A random-access source of samples: item i is drawn from (seed, i) alone.

    A sample is {"frames" uint8 (t, y, x, 3), "anchor" uint8 (y, x, 3), "caption" str, "tags" dict}. The anchor is the
    picture that the subject is known by: half of the time the clip's own first frame, else its poster, since in a
    long video every window but the first is anchored to a picture that is not its first frame.
    """

    def __init__(self, config: EmojiConfig, pack: EmojiPack | None = None):
        self.config = config
        self.pack = pack or EmojiPack()
        self._subjects = self.pack.held_out if config.split == "subjects" else self.pack.trained

    def __len__(self) -> int:
        return self.config.length

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of item `index`, and the generator to draw the rest from."""
        rng = np.random.default_rng((self.config.seed, index))
        while True:
            scene = draw_scene(self.pack, rng, kind=self.config.kind, subjects=self._subjects)
            if self.config.split == "subjects" or is_held_out_triple(self.pack, scene) == (
                self.config.split == "triples"
            ):
                return scene, rng

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        scene, rng = self.scene(index)
        frames = 1 if self.config.kind == "image" else self.config.num_frames
        clip = self.pack.render(scene, size=self.config.size, num_frames=frames)
        first = rng.random() < 0.5
        anchor_scene = dataclasses.replace(poster(scene.subject, scene.colour, scene.motion), look=scene.look)
        anchor = clip[0] if first else self.pack.render(anchor_scene, size=self.config.size, num_frames=1)[0]
        tags = {"subject": self.pack.subjects[scene.subject].code, "colour": scene.colour, "motion": scene.motion}
        is_open = self.config.kind == "video" and rng.random() < OPEN_SHARE
        words = caption(self.pack, scene, rng, templates=OPEN_TEMPLATES if is_open else TEMPLATES)
        return {"frames": clip, "anchor": anchor, "caption": words, "tags": tags}
