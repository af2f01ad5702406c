"""The script that records and compares scores of the published weights, tested with small weights."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """A copy of the file of figures."""
    file = tmp_path / "scores.json"
    file.write_text((ROOT / "examples" / "reward_scores.json").read_text())
    return file


def test_recorded_figures_name_existing_rewards(parity: ModuleType, figures: Path) -> None:
    shipped = json.loads(figures.read_text())
    assert shipped.keys() <= {"note", *parity.CASES}
    for name in shipped.keys() & parity.CASES.keys():
        assert len(shipped[name]["scores"]) == len(parity.PROMPTS)


def test_images_depend_only_on_their_number(parity: ModuleType) -> None:
    batch = parity.make_images()
    assert [image.size[::-1] for image in batch] == parity.SIZES
    y, x, c = 123, 200, 2
    height, width = parity.SIZES[1]
    v, u = y / (height - 1), x / (width - 1)
    wave = math.sin((5 + 3 * c + 1) * u + (4 + 2 * 1) * v + c) + math.cos(40 * u * v * 2)
    assert batch[1].getpixel((x, y))[c] == round((wave / 4 + 0.5) * 255)
    for image, images in zip(batch, parity.tensors(batch), strict=True):
        assert torch.tensor(image.getpixel((5, 7))).div(255).tolist() == images[0, :, 7, 5].tolist()


def test_recorded_scores_are_compared(
    parity: ModuleType, figures: Path, tiny: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"pretrained={tiny['clip']}", f"head={tiny['aesthetic']}/v1.pth", f"--file={figures}"]
    with pytest.raises(SystemExit, match=r"has no figures for aesthetic-v1 yet: .* --record"):
        parity.main(["aesthetic-v1", *arguments])
    assert parity.main(["aesthetic-v1", *arguments, "--record"]) == 0
    assert parity.main(["aesthetic-v1", *arguments]) == 0
    assert "allowed 0.1" in capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert "transformers" in content["aesthetic-v1"]["software"]
    assert content["aesthetic-v1"]["arguments"] == {"version": "v1", "pretrained": "tiny-clip", "head": "v1.pth"}
    content["aesthetic-v1"]["scores"][2] += 0.2
    figures.write_text(json.dumps(content))
    assert parity.main(["aesthetic-v1", *arguments]) == 1


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_similarities_are_recorded(
    name: str, parity: ModuleType, figures: Path, tiny: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    processor = [f"processor={tiny['clip']}"] if name == "pickscore" else []
    arguments = [name, f"pretrained={tiny['clip']}", *processor, f"--file={figures}"]
    assert parity.main([*arguments, "--record"]) == 0
    scores = json.loads(figures.read_text())[name]["scores"]
    assert (max(map(abs, scores)) > 1) == (name == "pickscore")
    parity.main(arguments)
    lines = capsys.readouterr().out.splitlines()[1:5]
    assert [line.split("reference")[1].split()[0] for line in lines] == [f"{score:.5f}" for score in scores]


def test_arguments_that_are_not_pairs_are_rejected(parity: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.main(["hpsv2.1", "weights"])
    assert "written NAME=VALUE" in capsys.readouterr().err
