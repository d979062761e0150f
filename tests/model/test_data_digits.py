# SPDX-License-Identifier: Apache-2.0
"""Moving digits: prompts, determinism, geometry and splits."""

import pytest
import torch

from disca.data import ClipSource, MovingDigits, build_source
from disca.data.digits import _handwritings
from disca.data.prompts import DIAGONALS, DIRECTIONS, SPEEDS
from disca.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("options", "shape", "vocabulary"),
    [
        ({}, (1, 8, 16, 16), 17),
        ({"starts": "free", "frames": 5, "size": 13}, (1, 5, 13, 13), 17),
        ({"starts": "centre", "size": 8, "diagonals": True}, (1, 8, 8, 8), 21),
        ({"digits": 2, "size": 24, "starts": "grid", "grid_step": 8}, (1, 8, 24, 24), 27),
    ],
)
def test_sample_shapes(options, shape, vocabulary):
    source = MovingDigits(**options)
    assert isinstance(source, ClipSource)
    assert source.shape == shape
    assert source.text_dim == source.pooled_dim == vocabulary
    batch = source.sample(7, generator())
    assert batch.clips.shape == (7, *shape)
    assert batch.clips.dtype == torch.float32
    assert batch.clips.min() == -1
    assert batch.clips.max() == 1
    assert batch.condition.text.shape == (7, source.text_tokens, vocabulary)
    assert batch.condition.text_lengths.tolist() == [source.text_tokens] * 7
    assert batch.condition.guidance is None
    for column, size in zip(batch.labels.unbind(1), source.label_sizes, strict=True):
        assert column.min() >= 0
        assert column.max() < size
    assert source.sample(0, generator()).clips.shape == (0, *shape)


def test_sample_is_a_function_of_the_generator():
    source = MovingDigits(starts="free", digits=2, size=24)
    torch.manual_seed(1)
    first = source.sample(16, generator(3))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = MovingDigits(starts="free", digits=2, size=24).sample(16, generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.clips, second.clips)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.condition.text, second.condition.text)
    assert not torch.equal(first.clips, source.sample(16, generator(4)).clips)


@pytest.mark.parametrize("starts", ["centre", "grid", "free"])
@pytest.mark.parametrize("digits", [1, 2])
def test_motion_is_a_roll(starts, digits):
    source = MovingDigits(starts=starts, digits=digits, size=20, frames=12, diagonals=True)
    batch = source.sample(48, generator())
    steps = DIRECTIONS | DIAGONALS
    for clip, prompt in zip(batch.clips, source.prompts.prompts(batch.labels), strict=True):
        _, direction, speed = prompt.split()
        dy, dx = (component * SPEEDS[speed] for component in steps[direction])
        for frame in range(12):
            rolled = clip[0, 0].roll((frame * dy, frame * dx), (0, 1))
            assert torch.equal(clip[0, frame], rolled)


def test_wraps_round_the_border():
    """By hand: a centred digit that goes 2 pixels left a frame is cut in half at frame 4."""
    source = MovingDigits(starts="centre", frames=5)
    labels = source.labels(["7 left fast"])
    clip = source.render(labels, generator())[0, 0]
    glyph = clip[0, 4:12, 4:12]
    assert glyph.max() > 0
    assert (clip[0] > -1).sum() == (glyph > -1).sum()
    assert torch.equal(clip[4, 4:12, 12:16], glyph[:, :4])
    assert torch.equal(clip[4, 4:12, 0:4], glyph[:, 4:])
    assert (clip[4] > -1).sum() == (glyph > -1).sum()


def test_two_digits_stand_side_by_side():
    source = MovingDigits(starts="centre", size=24, digits=2)
    clip = source.render(source.labels(["37 up slow"]), generator())[0, 0, 0]
    images, first, count = _handwritings("train")
    for digit, columns in ((3, slice(4, 12)), (7, slice(12, 20))):
        own = images[first[digit] : first[digit] + count[digit]]
        assert (own == clip[8:16, columns]).all((1, 2)).any()


@pytest.mark.parametrize("starts", ["centre", "grid", "free"])
def test_start_positions(starts):
    source = MovingDigits(starts=starts, grid_step=8)
    starts_seen = {tuple(p) for p in source._start(4000, generator()).tolist()}
    expected = {
        "centre": {(4, 4)},
        "grid": {(y, x) for y in (0, 8) for x in (0, 8)},
        "free": {(y, x) for y in range(16) for x in range(16)},
    }
    assert starts_seen == expected[starts]


def test_splits_are_disjoint_and_stratified():
    train, _, train_count = _handwritings("train")
    test, _, test_count = _handwritings("test")
    assert len(train) + len(test) == 1797
    share = test_count / (train_count + test_count)
    assert (share - 0.2).abs().max() < 0.01
    pairwise = (train[:, None] == test[None]).flatten(2).all(2)
    assert not pairwise.any()


def test_each_split_draws_its_own_handwriting():
    source = MovingDigits(starts="centre", size=8)
    for split in ("train", "test"):
        images, first, count = _handwritings(split)
        batch = source.sample(64, generator(), split=split)
        for clip, digit in zip(batch.clips, batch.labels[:, 0].tolist(), strict=True):
            own = images[first[digit] : first[digit] + count[digit]]
            assert (own == clip[0, 0]).all((1, 2)).any()


@pytest.mark.parametrize(
    "options", [{}, {"digits": 2, "size": 24}, {"diagonals": True}], ids=["one", "two", "diagonal"]
)
def test_prompts_round_trip(options):
    source = MovingDigits(**options)
    prompts = source.all_prompts()
    numbers, directions, speeds = source.label_sizes
    assert len(set(prompts)) == len(prompts) == numbers * directions * speeds
    assert source.prompts.prompts(source.labels(prompts)) == prompts
    pooled = source.encode(prompts).pooled
    assert len(torch.unique(pooled, dim=0)) == len(prompts)


def test_encode_one_hot_and_null():
    source = MovingDigits()
    vocabulary = source.prompts.vocabulary
    condition = source.encode(["7 Left fast", "", "<null>", "0 down slow"])
    assert condition.text_lengths.tolist() == [3, 1, 1, 3]
    words = [[vocabulary[i] for i in row.argmax(1)] for row in condition.text]
    assert words[0] == ["7", "left", "fast"]
    assert words[3] == ["0", "down", "slow"]
    assert torch.equal(condition.text[1], condition.text[2])
    assert words[1][0] == "<null>"
    assert condition.text[1, 1:].abs().sum() == 0
    assert torch.equal(condition.pooled, condition.text.sum(1))
    assert source.encode([]).text.shape == (0, 3, 17)
    null = source.null(2)
    assert torch.equal(null.text, condition.text[1:3])
    assert torch.equal(null.text_lengths, condition.text_lengths[1:3])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("7 lefft fast", "unknown word 'lefft'.*left, right, up, down.*did you mean 'left'"),
        ("7 left warp", "unknown word 'warp'.*slow, fast"),
        ("left 7 fast", "reads direction digit speed, expected the form"),
        ("7 left", "has 2 words, expected 3"),
        ("7 left fast fast", "has 4 words, expected 3"),
        ("37 left fast", "'37' has 2 digits, this data has 1"),
        ("7 up-left fast", "unknown word 'up-left'"),
        ("٧ left fast", "unknown word"),
    ],
)
def test_rejects_prompts(prompt, message):
    with pytest.raises(UserError, match=message):
        MovingDigits().encode(["1 up slow", prompt])


def test_rejects_a_bare_string():
    with pytest.raises(UserError, match="list of prompts"):
        MovingDigits().encode("7 left fast")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'kind' is missing"),
        ({"kind": "digit"}, "unknown kind 'digit'.*did you mean 'digits'"),
        ({"kind": "digits", "frame": 8}, "unknown option 'frame'.*did you mean 'frames'"),
        ({"kind": "digits", "frames": 1}, "frames must be at least 2, got 1"),
        ({"kind": "digits", "frames": "8"}, "frames must be an integer, got '8'"),
        ({"kind": "digits", "size": 7}, "size must be at least 8"),
        ({"kind": "digits", "size": 16, "digits": 2}, "size must be at least 20"),
        ({"kind": "digits", "digits": 3}, "digits must be 1 or 2"),
        ({"kind": "digits", "starts": "middle"}, "starts must be one of centre, grid, free"),
        ({"kind": "digits", "grid_step": 5}, "grid_step must divide the size 16, got 5"),
        ({"kind": "digits", "diagonals": 1}, "diagonals must be true or false"),
    ],
)
def test_rejects_configs(config, message):
    with pytest.raises(UserError, match=message):
        build_source(config)


def test_rejects_split_and_count():
    source = MovingDigits()
    with pytest.raises(UserError, match="split must be one of 'train', 'test', got 'val'"):
        source.sample(2, generator(), split="val")
    with pytest.raises(UserError, match="number of clips must be at least 0, got -1"):
        source.sample(-1, generator())


def test_config_round_trip():
    source = MovingDigits(frames=6, size=24, starts="free", digits=2, diagonals=True)
    again = build_source(source.config)
    assert torch.equal(again.sample(4, generator()).clips, source.sample(4, generator()).clips)
    options = {name: value for name, value in source.config.items() if name != "kind"}
    assert MovingDigits.from_config(options).config == source.config
