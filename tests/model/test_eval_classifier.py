# SPDX-License-Identifier: Apache-2.0
"""The classifier: learning, translation, determinism, files."""

import pytest
import torch
from safetensors.torch import save_file

from disca.data import MovingDigits
from disca.errors import UserError
from disca.eval import ClipClassifier, real_scores, semantic_score, train_classifier

SMALL = {"frames": 4, "size": 8, "starts": "free"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained() -> ClipClassifier:
    return train_classifier(MovingDigits(**SMALL), steps=80, batch=32)


def test_learns_held_out_handwriting(trained):
    source = MovingDigits(**SMALL)
    batch = source.sample(600, generator(5), split="test")
    score = semantic_score(trained, batch.clips, batch.labels)
    assert score.count == 600
    assert score.digit > 0.3  # chance 0.1
    assert score.direction > 0.6  # chance 0.25
    assert score.speed > 0.75  # chance 0.5
    assert score.joint <= min(score.digit, score.direction, score.speed)
    wrong = batch.labels.clone()
    wrong[:, 1] = (wrong[:, 1] + 1) % 4
    swapped = semantic_score(trained, batch.clips, wrong)
    assert swapped.direction < 0.3
    assert swapped.digit == score.digit


def test_real_scores(trained):
    source = MovingDigits(**SMALL)
    real = real_scores(trained, source, 200, seed=1)
    again = real_scores(trained, source, 200, seed=1)
    assert real.semantic == again.semantic
    assert real.frechet == again.frechet > 0
    assert real.features.shape == (200, 64)
    assert real_scores(trained, source, 200, seed=2).frechet != real.frechet


def test_training_is_a_function_of_the_seed():
    source = MovingDigits(**SMALL)
    state = torch.get_rng_state()
    losses: list[float] = []
    one = train_classifier(
        source, steps=3, batch=4, seed=7, progress=lambda step, loss: losses.append(loss)
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    two = train_classifier(source, steps=3, batch=4, seed=7)
    other = train_classifier(source, steps=3, batch=4, seed=8)
    assert len(losses) == 3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.digit.weight, other.digit.weight)


@pytest.mark.parametrize("shift", [(4, 8), (12, 4), (-4, 0)])
def test_position_on_the_torus_makes_no_difference(trained, shift):
    """Strides multiply to 4 in space, so shifts by multiples of 4 leave the features alone."""
    clips = MovingDigits(frames=4, size=16).sample(5, generator()).clips
    moved = clips.roll(shift, (3, 4))
    assert (trained.embed(clips) - trained.embed(moved)).abs().max() < 1e-4
    assert (trained.embed(clips) - trained.embed(clips.flip(2))).abs().max() > 1e-2


def test_two_digits_share_their_classes():
    classifier = ClipClassifier(1, (100, 8, 2)).eval()
    clips = MovingDigits(digits=2, size=20, frames=4).sample(6, generator()).clips
    digit, direction, speed = classifier(clips)
    assert digit.shape == (6, 100)
    assert direction.shape == (6, 8)
    assert speed.shape == (6, 2)
    left, right = classifier.digit(classifier.features(clips)).chunk(2, 1)
    assert torch.equal(digit[:, 37], left[:, 3] + right[:, 7])
    assert torch.equal(digit.argmax(1), 10 * left.argmax(1) + right.argmax(1))


def test_evaluation_ignores_batching_and_keeps_the_mode(trained):
    clips = MovingDigits(**SMALL).sample(7, generator()).clips
    torch.testing.assert_close(trained.embed(clips, batch=2), trained.embed(clips))
    assert torch.equal(trained.predict(clips, batch=3), trained.predict(clips))
    model = ClipClassifier(1, (10, 4, 2)).train()
    before = model.layers[0].norm.running_mean.clone()
    assert not model.embed(clips).requires_grad
    assert model.training
    assert torch.equal(model.layers[0].norm.running_mean, before)


def test_save_and_load(trained, tmp_path):
    path = tmp_path / "new" / "classifier.safetensors"
    trained.save(path)
    loaded = ClipClassifier.load(path)
    assert not loaded.training
    assert loaded.label_sizes == (10, 4, 2)
    clips = MovingDigits(**SMALL).sample(5, generator()).clips
    assert torch.equal(loaded.embed(clips), trained.embed(clips))
    content = path.read_bytes()
    trained.save(path)
    assert path.read_bytes() == content


def test_load_refuses(trained, tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors' does not exist"):
        ClipClassifier.load(tmp_path / "gone.safetensors")
    path = tmp_path / "c.safetensors"
    trained.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a classifier file"):
        ClipClassifier.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is not a classifier file"):
        ClipClassifier.load(path)
    save_file(
        {"a": torch.zeros(2)},
        path,
        {"classifier": '{"channels": 1, "label_sizes": [10, 4, 2], "feature_dim": 64}'},
    )
    with pytest.raises(UserError, match="is not a classifier file"):
        ClipClassifier.load(path)


def test_save_refuses(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        trained.save(tmp_path / "file" / "c.safetensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClipClassifier(1, (7, 4, 2)), "10 or 100 classes, got 7"),
        (lambda: train_classifier(MovingDigits(), steps=0), "classifier steps must be at least 1"),
        (lambda: train_classifier(MovingDigits(), batch=1), "classifier batch must be at least 2"),
        (
            lambda: ClipClassifier(1, (10, 4, 2)).predict(torch.zeros(0, 1, 4, 8, 8)),
            r"B > 0, got shape \[0, 1, 4, 8, 8\]",
        ),
        (
            lambda: ClipClassifier(1, (10, 4, 2)).embed(torch.zeros(2, 3, 4, 8, 8)),
            r"clips \[B, 1, F, H, W\]",
        ),
        (
            lambda: real_scores(ClipClassifier(1, (10, 4, 2)), MovingDigits(), 1),
            "number of real clips must be at least 2",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(UserError, match=message):
        call()
