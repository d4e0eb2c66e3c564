"""The embedded world: deterministic, complete in words and pictures, and honest about what the base may see."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import HEADS, class_indices, targets
from lit_personalize.tinyworld.build import seconds_of
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, SUBJECTS_FOR_SCIENCE, subject_pictures
from lit_personalize.tinyworld.dataset import sample_pictures, write_shards
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import (
    KIND_SHARES,
    Scene,
    Thing,
    is_held_out,
    sample_body,
    sample_scene,
    sample_split,
    split_of,
)
from lit_personalize.tinyworld.score import balanced_accuracy, colors_from_pixels
from lit_personalize.tinyworld.tokenizer import build_tokenizer, world_words

STAR = Scene("object", (Thing("star", "red"),), background="blue")
CRITTER = Scene("critter", background="white", color="green", body=(0.5,) * len(v.CRITTER_BODY))
PERSON = Scene("person", background="white", color="green", body=(0.5,) * len(v.CRITTER_BODY))


def test_the_tables_are_large_enough() -> None:
    assert {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"} <= set(v.COLORS)
    assert {"circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond"} <= set(v.SHAPES)
    assert len(v.STYLES) >= 9 and len(v.HELD_OUT_STYLES) == 4 and len(v.CRITTER_ATTRIBUTES) >= 8
    assert len(HELD_OUT_CONCEPTS) >= 50 and set(SUBJECTS_FOR_SCIENCE) <= set(HELD_OUT_CONCEPTS)


def test_named_colours_are_apart() -> None:
    colors = np.array(list(v.ALL_COLORS.values()))
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 9 * np.eye(len(colors))
    assert distances.min() >= 0.2


@pytest.mark.parametrize("kind", list(KIND_SHARES))
def test_a_scene_is_drawn_alike_every_time(kind: str) -> None:
    scene = sample_scene(np.random.default_rng(3), "all", kind)  # type: ignore[arg-type]
    assert np.array_equal(render(scene), render(scene))
    large = np.asarray(Image.fromarray(render(scene, 128)).resize((64, 64), Image.Resampling.BOX), dtype=float)
    if scene.style == "photo":
        assert np.abs(large - render(scene)).mean() < 8


@pytest.mark.parametrize(
    "changed",
    [
        *(replace(STAR, things=(replace(STAR.things[0], shape=s),)) for s in v.ALL_SHAPES if s != "star"),
        *(replace(STAR, things=(replace(STAR.things[0], color=c),)) for c in v.ALL_COLORS if c != "red"),
        *(replace(STAR, things=(replace(STAR.things[0], texture=t),)) for t in v.ALL_TEXTURES if t != "flat"),
        *(replace(STAR, background=b) for b in (*v.COLORS, *v.PLACES) if b != "blue"),
        *(replace(STAR, style=s) for s in v.ALL_STYLES if s != "photo"),
    ],
    ids=lambda s: f"{s.things[0].shape}-{s.things[0].color}-{s.things[0].texture}-{s.background}-{s.style}",
)
def test_every_object_attribute_shows_in_picture_and_caption(changed: Scene) -> None:
    difference = np.abs(render(changed).astype(int) - render(STAR)).max(-1) > 24
    assert difference.sum() >= 20
    assert caption(changed) != caption(STAR)


@pytest.mark.parametrize("scene", [CRITTER, PERSON], ids=["critter", "person"])
def test_every_part_shows_in_picture_and_caption(scene: Scene) -> None:
    for name, phrase in (v.CRITTER_ATTRIBUTES if scene.kind == "critter" else v.PERSON_ATTRIBUTES).items():
        with_it = replace(scene, attributes=(name,))
        assert (np.abs(render(with_it).astype(int) - render(scene)).max(-1) > 24).sum() >= 20, name
        assert phrase in caption(with_it)


def test_plain_phrases_are_in_the_grammar() -> None:
    assert caption(Scene("object", (Thing("circle", "red"),), background="blue")) == "a red circle on a blue background"
    assert caption(Scene("object", (Thing("star", "orange"),), "beach")) == "an orange star on the beach"
    pair = Scene("pair", (Thing("ring", "red"), Thing("cross", "blue")), "white", relation="left")
    assert caption(pair) == "a red ring to the left of a blue cross on a white background"


def test_synonyms_vary_the_words_and_not_the_meaning() -> None:
    rng = np.random.default_rng(0)
    said = [caption(STAR, rng) for _ in range(400)]
    assert len(set(said)) > 20
    assert all("star" in s and ("blue" in s or "azure" in s) for s in said)
    colored = sum("red" in s or "scarlet" in s for s in said) / len(said)
    assert 0.85 < colored < 0.95, "one caption in ten leaves the colour unsaid"


def test_class_prompts_are_captions_of_the_grammar() -> None:
    rng = np.random.default_rng(0)
    critter = Scene("critter", background="blue", color="red", attributes=("horns", "hat"))
    said = [caption(critter, rng) for _ in range(20_000)]
    assert "a photo of a critter on a blue background" in said
    assert any("horns" in s and "red" not in s and "scarlet" not in s for s in said)
    assert caption(critter) == "a red critter with horns and a hat on a blue background"
    person = Scene("person", background="beach", color="red")
    assert "a photo of a person on the beach" in {caption(person, rng) for _ in range(5_000)}


def test_the_base_never_sees_what_is_held_out() -> None:
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_scene(rng, "base")) for _ in range(1500))
    assert any(is_held_out(sample_scene(rng, "all")) for _ in range(100))


def test_about_a_tenth_of_the_combinations_is_kept_for_testing() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "base", "object") for _ in range(3000)]
    share = sum(split_of(s) == "test" for s in scenes) / len(scenes)
    assert 0.07 < share < 0.13
    held = {(s.things[0].shape, s.things[0].color, s.background) for s in scenes if split_of(s) == "test"}
    seen = {(s.things[0].shape, s.things[0].color, s.background) for s in scenes if split_of(s) == "train"}
    assert not held & seen
    assert split_of(sample_split(rng, "test")) == "test"


def test_there_are_thousands_of_identities() -> None:
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(4000):
        scene = sample_scene(rng, "base", "critter")
        found.add((scene.color, scene.attributes, scene.body))
    assert len(found) >= 3000
    a, b = (render(replace(CRITTER, body=sample_body(rng))) for _ in range(2))
    assert not np.array_equal(a, b)


def test_more_pictures_extend_fewer() -> None:
    few, many = sample_pictures(3, 5), sample_pictures(5, 5)
    assert np.array_equal(few.pixels, many.pixels[:3]) and few.scenes == many.scenes[:3]


def test_shards_hold_pictures_captions_and_scenes(tmp_path: Path) -> None:
    pictures = sample_pictures(5, 1)
    first, second = write_shards(pictures, tmp_path, per_shard=3)
    with tarfile.open(second) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert sorted(members) == sorted(f"00001000{i}.{s}" for i in range(2) for s in ("jpg", "txt", "json"))
    decoded = np.asarray(Image.open(io.BytesIO(members["000010000.jpg"])))
    assert np.abs(decoded.astype(int) - pictures.pixels[3]).mean() < 4
    assert json.loads(members["000010001.json"])["kind"] == pictures.scenes[4].kind


@pytest.mark.parametrize("name", SUBJECTS_FOR_SCIENCE)
def test_subjects_keep_their_attributes_and_vary_the_rest(name: str) -> None:
    pictures, subject = subject_pictures(name, 8), HELD_OUT_CONCEPTS[name]
    assert len({scene.background for scene in pictures.scenes}) >= 5
    for scene in pictures.scenes:
        truth = targets(scene)
        assert all(truth[head] == value for head, value in subject.attributes.items() if head in truth)


def test_every_scene_has_targets_that_the_reader_knows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        indices = class_indices(targets(sample_scene(rng, "all")))
        assert indices.shape == (len(HEADS),) and (indices >= 0).any()


def test_balanced_accuracy_weighs_classes_alike() -> None:
    pairs = [("a", "a")] * 9 + [("b", "a")]
    assert balanced_accuracy(pairs) == 0.5
    assert balanced_accuracy([("a", "unclear")]) == 0.0


@pytest.mark.parametrize("color", ["red", "green", "yellow", "purple"])
def test_colours_are_read_from_pixels(color: str) -> None:
    scene = Scene("object", (Thing("square", color),), background="black")
    assert colors_from_pixels(render(scene)) == ("black", color)


def test_every_word_is_one_token_and_tokens_can_be_added(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    build_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in world_words())
    rng = np.random.default_rng(0)
    longest = max(len(tokenizer(caption(sample_scene(rng, "all"), rng)).input_ids) for _ in range(400))
    assert longest <= tokenizer.model_max_length
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new1>"]) == 1
    assert tokenizer("a <new1> star", add_special_tokens=False).input_ids[1] == size


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("150m", 9000), ("2.5h", 9000)])
def test_budgets_are_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds
    with pytest.raises(UsageError, match="is not a duration"):
        seconds_of(text[:-1])


def test_world_render_writes_folders_and_shards(tmp_path: Path) -> None:
    assert main(["world", "render", "-o", str(tmp_path / "a"), "--count", "3"]) == 0
    assert len(list((tmp_path / "a").glob("*.png"))) == 3
    assert main(["world", "render", "-o", str(tmp_path / "b"), "--count", "3", "--shards"]) == 0
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["00000.tar"]
    subject = ["--subject", SUBJECTS_FOR_SCIENCE[0]]
    assert main(["world", "render", "-o", str(tmp_path / "c"), "--count", "2", *subject]) == 0
