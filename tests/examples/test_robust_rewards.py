"""The measurement of robust rewards: interpolation to equal trained reward, standard errors, and the rewards' names."""

import math

import pytest
import torch

from examples.robust_rewards import REWARDS, TRAINED, Curve, captions, difference, table


def curve(levels: list[float], quality: list[list[float]]) -> Curve:
    trained = torch.tensor(levels).unsqueeze(1).expand(-1, len(quality[0]))
    return Curve([5 * i for i in range(len(levels))], {TRAINED: trained, "quality": torch.tensor(quality)})


def test_scores_are_interpolated_to_the_first_step_with_the_level() -> None:
    found = curve([0.0, 1.0, 3.0, 2.0], [[10.0, 20.0], [12.0, 22.0], [20.0, 20.0], [0.0, 0.0]])
    assert found.at(2.0)["quality"].tolist() == [16.0, 21.0]
    assert found.at(-1.0)["quality"].tolist() == [10.0, 20.0]


def test_the_standard_error_has_the_variances_of_captions_and_of_seeds() -> None:
    ours = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])]
    mean, error = difference(ours, [torch.zeros(2)] * 2)
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(2.0 / 2 + 0.5 / 2))  # of (1.5, 3.5) over captions, of (2, 3) over seeds


def test_the_table_compares_at_levels_that_all_runs_reach() -> None:
    plain = curve([0.0, 2.0, 4.0], [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]])
    other = curve([0.0, 1.0, 2.0], [[1.0, 1.0], [2.5, 2.5], [3.0, 3.0]])
    lines = table({"ImageQuality": [plain], "Augmented": [other]}).splitlines()
    assert lines[2:] == [
        "| 0.000 | (base model) | 0 | 1.000 |",
        "| 1.000 | ImageQuality | 5 | 1.500 |",
        "| 1.000 | Augmented | 5 | +1.000 ± 0.000 |",
        "| 2.000 | ImageQuality | 5 | 2.000 |",
        "| 2.000 | Augmented | 10 | +1.000 ± 0.000 |",
    ]


def test_robust_classifier_rewards_score_logits_of_the_first_classifier() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    built = REWARDS["classifier"]()
    first = built["ImageQuality"](images, ["a", "b"])
    assert built["Ensemble"].breakdown(images, ["a", "b"])[1]["first"].tolist() == first.tolist()
    assert built["Augmented"].reward(images, ["a", "b"]).tolist() == first.tolist()


def test_the_relative_reward_adds_the_style_that_captions_for_clip_leave_out() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = captions("emoji64_eval", "clip")[:2]
    assert found == ["ant", "bacon"]
    built = REWARDS["clip"]()
    noto, twemoji = (built["CLIPScore"](images, [f"{style} {c}" for c in found]) for style in ("noto", "twemoji"))
    torch.testing.assert_close(built["Relative"](images, found), 2 * noto - twemoji)
