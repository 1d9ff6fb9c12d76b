"""The emoji set: deterministic, on a torus, captioned truthfully, and without leaks."""

import collections
import dataclasses

import numpy as np
import pytest

from magic141_jax.data.emoji import (
    CANVAS,
    COLOURS,
    LOOKS,
    MOTIONS,
    SIZES,
    EmojiClips,
    EmojiConfig,
    EmojiPack,
    Scene,
    caption,
    is_held_out_triple,
    poster,
)
from magic141_jax.errors import UserError


@pytest.fixture(scope="module")
def pack():
    return EmojiPack()


def test_one_subject_in_ten_is_held_out_and_never_drawn_for_training(pack):
    assert len(pack.held_out) * 10 == len(pack.subjects)
    codes = {pack.subjects[i].code for i in pack.held_out}
    train = EmojiClips(EmojiConfig(length=200), pack)
    assert not codes & {pack.subjects[train.scene(i)[0].subject].code for i in range(200)}
    held = EmojiClips(EmojiConfig(length=40, split="subjects"), pack)
    assert {pack.subjects[held.scene(i)[0].subject].code for i in range(40)} <= codes


def test_triples_are_split_between_training_and_test(pack):
    for split, expected in (("train", False), ("triples", True)):
        clips = EmojiClips(EmojiConfig(length=50, split=split), pack)
        assert all(is_held_out_triple(pack, clips.scene(i)[0]) is expected for i in range(50))


def test_an_item_depends_on_seed_and_index_alone(pack):
    first, again = (EmojiClips(EmojiConfig(length=8, seed=3), pack) for _ in range(2))
    one, two = again[5], first[5]
    assert one["caption"] == two["caption"]
    np.testing.assert_array_equal(one["frames"], two["frames"])
    other = EmojiClips(EmojiConfig(length=8, seed=4), pack)[5]
    assert other["frames"].shape == one["frames"].shape == (17, CANVAS, CANVAS, 3)
    assert (other["frames"] != one["frames"]).any()


def test_motion_is_a_translation_on_the_torus(pack):
    loop = pack.frames(0)
    pack._frames[0] = np.repeat(loop[:1], len(loop), axis=0)  # without the subject's own animation
    try:
        for name in ("left", "right", "up", "down"):
            clip = pack.render(Scene(0, "blue", name, (5.0, 60.0), 36.0))
            dy, dx = MOTIONS[name].velocity
            for i in (1, 9, 16):
                np.testing.assert_array_equal(clip[i], np.roll(clip[0], (int(dy * i), int(dx * i)), axis=(0, 1)))
    finally:
        pack._frames[0] = loop


def test_growth_stops_at_the_limits(pack):
    def foreground(clip):
        return [(frame != COLOURS["blue"]).any(-1).sum() for frame in clip]

    grown = foreground(pack.render(Scene(3, "blue", "grows", (32, 32), SIZES[1]), num_frames=3))
    assert np.ptp(grown) < 0.2 * grown[0]
    growing = foreground(pack.render(Scene(3, "blue", "grows", (32, 32), 26.0)))
    assert growing[-1] > 1.8 * growing[0]


def test_posters_show_the_subject_whole(pack):
    for motion in MOTIONS:
        scene = poster(1, "green", motion)
        assert all(scene.size / 2 <= c <= CANVAS - scene.size / 2 for c in scene.centre)


def test_a_video_start_does_not_tell_its_motion(pack):
    """The mean start position and size of each motion agree: only the caption names the direction."""
    clips = EmojiClips(EmojiConfig(length=4000), pack)
    starts = collections.defaultdict(list)
    for i in range(4000):
        scene, _ = clips.scene(i)
        starts[scene.motion].append((*scene.centre, scene.size))
    everything = np.concatenate(list(starts.values()))
    for values in starts.values():
        error = np.abs(np.mean(values, axis=0) - everything.mean(0))
        assert (error < 4 * everything.std(0) / np.sqrt(len(values))).all()


def test_captions_name_subject_colour_and_motion(pack):
    rng = np.random.default_rng(0)
    scene = Scene(pack.index("octopus"), "orange", "up", (0, 0), 36.0)
    assert caption(pack, scene) == "an octopus moves up on an orange background"
    assert caption(pack, dataclasses.replace(scene, subject=pack.index("unicorn"))).startswith("a unicorn")
    for _ in range(50):
        text = caption(pack, scene, rng)
        assert "octopus" in text
        assert "orange" in text
        assert any(word in text for word in MOTIONS["up"].words)


def test_videos_have_captions_that_leave_the_rest_to_the_first_frame(pack):
    words = {"image": [], "video": []}
    for kind, found in words.items():
        clips = EmojiClips(EmojiConfig(kind=kind, length=300), pack)
        found += [(clips.scene(i)[0], clips[i]["caption"]) for i in range(300 if kind == "video" else 60)]
    assert all(scene.colour in text and not scene.look for scene, text in words["image"])
    closed = sum(scene.colour in text for scene, text in words["video"])
    assert 200 < closed < 295
    for scene, text in words["video"]:
        named = any(name in text for name in pack.subjects[scene.subject].names)
        assert not (scene.look and named)


def test_a_look_is_the_subject_turned_mirrored_or_with_other_colours(pack):
    plain = Scene(pack.index("shark"), "blue", "still", (32.0, 32.0), 40.0)
    pictures = [pack.render(dataclasses.replace(plain, look=i), num_frames=1)[0] for i in range(LOOKS)]
    assert len({p.tobytes() for p in pictures}) == LOOKS
    sizes = [(p != np.array(COLOURS["blue"], np.uint8)).any(-1).sum() for p in pictures]
    assert max(sizes) < 1.05 * min(sizes)
    assert (np.rot90(pictures[0]) == pictures[1]).mean() > 0.9


def test_larger_frames_show_the_same_scene(pack):
    scene = poster(2, "red", "left")
    small, large = (pack.render(scene, size=s, num_frames=1)[0].astype(float) for s in (64, 128))
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 3


def test_mistakes_are_named(pack, tmp_path):
    with pytest.raises(UserError, match="Did you mean 'shark'"):
        pack.index("shrak")
    with pytest.raises(UserError, match="no emoji pack"):
        EmojiPack(tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="can't read the emoji pack"):
        EmojiPack(tmp_path / "bad.zip")
