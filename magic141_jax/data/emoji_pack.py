"""Makes the emoji pack from Microsoft's animated Fluent emoji (MIT), as published on npm.

    npm pack @lobehub/fluent-emoji-anim-1 ... -4      (untar each one below FOLDER)
    python -m magic141_jax.data emoji-pack FOLDER datasets/emoji/emoji.zip

Every subject is cropped to the square around all its frames, thinned from 24 to 8 frames a second (24 frames, a loop
of 3 s) and stored as one animated WebP of 96 x 96 pixels with transparency; `emoji.jsonl` names them.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from magic141_jax.errors import UserError

FRAMES = 24
SIDE = 96
LICENCE = "Fluent emoji, (c) Microsoft Corporation, MIT licence"

# code point: (name, other words for it). Chosen for silhouettes that stay readable at 40 pixels; variants that look
# alike at that size are left out, and so is everything outside Microsoft's own published set.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "1f988": ("shark",),
    "1f405": ("tiger",),
    "1f407": ("rabbit", "bunny"),
    "1f408": ("cat", "kitty"),
    "1f415": ("dog", "puppy"),
    "1f404": ("cow",),
    "1f416": ("pig", "piglet"),
    "1f418": ("elephant",),
    "1f419": ("octopus",),
    "1f40c": ("snail",),
    "1f40d": ("snake", "serpent"),
    "1f40e": ("horse", "pony"),
    "1f412": ("monkey",),
    "1f413": ("rooster",),
    "1f433": ("whale",),
    "1f40a": ("crocodile", "alligator"),
    "1f422": ("turtle", "tortoise"),
    "1f420": ("tropical fish",),
    "1f421": ("blowfish", "pufferfish"),
    "1f427": ("penguin",),
    "1f428": ("koala",),
    "1f42b": ("camel",),
    "1f42c": ("dolphin",),
    "1f438": ("frog", "toad"),
    "1f43a": ("wolf",),
    "1f43b": ("bear",),
    "1f43c": ("panda",),
    "1f401": ("mouse",),
    "1f41d": ("bee", "honeybee"),
    "1f41e": ("ladybug", "ladybird"),
    "1f54a-fe0f": ("dove", "white bird"),
    "1f577-fe0f": ("spider",),
    "1f980": ("crab",),
    "1f981": ("lion",),
    "1f982": ("scorpion",),
    "1f984": ("unicorn",),
    "1f985": ("eagle",),
    "1f986": ("duck",),
    "1f987": ("bat",),
    "1f989": ("owl",),
    "1f98a": ("fox",),
    "1f98b": ("butterfly",),
    "1f98c": ("deer", "stag"),
    "1f98d": ("gorilla",),
    "1f98e": ("lizard", "gecko"),
    "1f98f": ("rhinoceros", "rhino"),
    "1f990": ("shrimp", "prawn"),
    "1f991": ("squid",),
    "1f992": ("giraffe",),
    "1f993": ("zebra",),
    "1f994": ("hedgehog",),
    "1f995": ("long-necked dinosaur", "brontosaurus"),
    "1f996": ("dinosaur", "tyrannosaurus"),
    "1f998": ("kangaroo",),
    "1f999": ("llama", "alpaca"),
    "1f99a": ("peacock",),
    "1f99b": ("hippopotamus", "hippo"),
    "1f99c": ("parrot",),
    "1f99d": ("raccoon",),
    "1f99e": ("lobster",),
    "1f9a2": ("swan",),
    "1f9a5": ("sloth",),
    "1f9a6": ("otter",),
    "1f9a9": ("flamingo",),
    "1f9ad": ("seal",),
    "1f424": ("chick", "baby chick"),
    "1f409": ("dragon",),
    "1f680": ("rocket", "spaceship"),
    "1f681": ("helicopter",),
    "1f682": ("locomotive", "steam train"),
    "1f68c": ("bus",),
    "1f691": ("ambulance",),
    "1f692": ("fire engine", "fire truck"),
    "1f693": ("police car",),
    "1f695": ("taxi", "cab"),
    "1f3ce-fe0f": ("racing car", "race car"),
    "1f3cd-fe0f": ("motorcycle", "motorbike"),
    "1f69c": ("tractor",),
    "1f6a2": ("ship",),
    "26f5": ("sailboat",),
    "2708-fe0f": ("airplane", "plane"),
    "1f6f8": ("flying saucer", "ufo"),
    "1f697": ("car", "automobile"),
    "1f308": ("rainbow",),
    "1f525": ("fire", "flame"),
    "26c4": ("snowman",),
    "2b50": ("star",),
    "1f31e": ("sun",),
    "2744-fe0f": ("snowflake",),
    "2602-fe0f": ("umbrella",),
    "1f916": ("robot",),
    "1f47b": ("ghost",),
    "1f47d": ("alien",),
    "1f480": ("skull",),
    "1f383": ("pumpkin", "jack-o-lantern"),
    "1f384": ("christmas tree",),
    "1f382": ("birthday cake", "cake"),
    "1f9f8": ("teddy bear",),
    "2764-fe0f": ("heart", "red heart"),
    "1f37a": ("beer mug", "beer"),
}

# One in ten, never trained on: image-to-video must animate them from their first frame alone.
HELD_OUT = (
    "1f422",
    "1f43c",
    "1f986",
    "1f98a",
    "1f996",
    "1f9a6",
    "1f692",
    "1f681",
    "1f47b",
    "1f9f8",
)


def build(source: Path, target: Path) -> dict[str, int]:
    """Writes the pack from the unpacked npm packages below `source`; returns the number of subjects and bytes.

    Raises:
      UserError: a subject's file is not below `source`, or is not an animation.
    """
    files = {path.stem: path for path in Path(source).rglob("*.webp")}
    missing = [code for code in SUBJECTS if code not in files]
    if missing:
        raise UserError(
            f"{len(missing)} emoji are not below {source}, first {missing[:3]}; unpack all four npm packages there"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".partial")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as pack:
        lines = []
        for code, names in SUBJECTS.items():
            pack.writestr(f"{code}.webp", _shrink(files[code]))
            lines.append(json.dumps({"code": code, "names": names, "held_out": code in HELD_OUT}))
        pack.writestr("emoji.jsonl", "\n".join(lines) + "\n")
        pack.writestr("NOTICE", LICENCE + "\n")
    temporary.rename(target)
    return {"subjects": len(SUBJECTS), "bytes": target.stat().st_size}


def _shrink(path: Path) -> bytes:
    """One subject as an animated WebP: square crop around all frames, 24 frames, 96 x 96."""
    with Image.open(path) as image:
        total = getattr(image, "n_frames", 1)
        if total < FRAMES:
            raise UserError(f"{path} has {total} frames, an animation of at least {FRAMES} is needed")
        frames = []
        for i in range(FRAMES):
            image.seek(i * total // FRAMES)
            frames.append(np.asarray(image.convert("RGBA")))
    stack = np.stack(frames)
    rows = np.flatnonzero((stack[..., 3] > 8).any(axis=(0, 2)))
    columns = np.flatnonzero((stack[..., 3] > 8).any(axis=(0, 1)))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    y, x = (top + bottom - side) // 2, (left + right - side) // 2
    small = [
        Image.fromarray(f).crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for f in frames
    ]
    out = io.BytesIO()
    small[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=small[1:],
        duration=125,
        loop=0,
        quality=85,
        method=6,
        minimize_size=True,
    )
    return out.getvalue()
