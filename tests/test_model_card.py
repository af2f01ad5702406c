"""Model cards, as huggingface_hub reads them, and the upload to a local stand-in of the hub."""

import ast
import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from lightning_draft.errors import ConfigurationError
from lightning_draft.methods.validation_record import Change, ValidationRecord
from lightning_draft.model_card import (
    Results,
    base_license,
    check_repository,
    model_card,
    push_to_hub,
    upload,
    write_card,
)
from lightning_draft.models import LoRA, StableDiffusion
from lightning_draft.models.scale_schedule import ScaleSchedule

HEADER = {
    "base": "runwayml/some-model",
    "base_sha256": "ab" * 32,
    "reward": "Brightness()",
    "step": "12",
    "scores": json.dumps({"val/reward": 0.75, "val/gain": 0.5, "val/judge": 2.0, "train/reward": 9.0}),
}


RESULTS = Results(
    {"reward": Change(0.25, 0.75, 0.125, 24), "judge": Change(1.5, 2.0, 0.5, 24)},
    ['a cat: "quoted"', "ein Bär"],
    {"optimizer": "AdamW, learning rate 0.001"},
)


def test_the_card_has_the_front_matter_that_the_hub_reads() -> None:
    card = ModelCard(model_card("bright", HEADER, "StableDiffusionPipeline", 4, comfy=True, results=RESULTS))
    assert card.data.base_model == "runwayml/some-model"
    assert {"lora", "text-to-image"} <= set(card.data.tags)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        **{"reward": 0.75, "reward, base model": 0.25, "reward, gain": 0.5},
        **{"judge": 2.0, "judge, base model": 1.5, "judge, gain": 0.5},
    }
    assert results["reward, gain"].metric_args == {"standard_error": 0.125}
    assert card.data.widget == [
        {"text": 'a cat: "quoted"', "output": {"url": "images/0.png"}},
        {"text": "ein Bär", "output": {"url": "images/1.png"}},
    ]
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    assert "## Scores of 24 images of held-out prompts" in card.text
    assert "| reward | 0.25 | 0.75 | +0.5 (0.12) |" in card.text
    assert "| judge | 1.5 | 2 | +0.5 (0.5) |" in card.text
    assert 'load_lora_weights(".", weight_name="best.safetensors")' in card.text
    assert "best.comfy.safetensors" in card.text
    assert "- rank: `4`" in card.text
    assert "- optimizer: `AdamW, learning rate 0.001`" in card.text
    assert "(images/before_after.png)" in card.text


def test_the_license_is_that_of_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its card in a folder, in the hub's cache, or of a shipped model; a card that cannot be read is left out."""
    front = "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\ntags: [x]\n---\n# y"
    (tmp_path / "README.md").write_text(front)
    expected = {"license": "other", "license_name": "flux-1-dev", "license_link": "LICENSE.md"}
    assert base_license(str(tmp_path)) == expected
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    (tmp_path / "hub" / "models--a--b" / "refs").mkdir()
    (tmp_path / "hub" / "models--a--b" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert base_license("a/b") == {"license": "creativeml-openrail-m"}
    assert base_license("emoji64") == {"license": "apache-2.0"}
    unknown = {"license": "other", "license_name": "license-of-the-base-model"}
    assert base_license("a/c") == unknown
    (tmp_path / "README.md").write_text("---\nlicense: [1\n---\n")
    assert base_license(str(tmp_path)) == unknown
    card = ModelCard(model_card("x", {"base": "a/b"}, "StableDiffusionPipeline", 4, comfy=False))
    assert card.data.license == "creativeml-openrail-m"
    assert "The license of the base model applies: `creativeml-openrail-m`." in card.text


def test_a_local_base_and_missing_scores_are_left_out() -> None:
    text = model_card("bright", {"base": "emoji64"}, "StableDiffusionPipeline", None, comfy=False)
    card = ModelCard(text)
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert "Scores" not in text
    assert "ComfyUI" not in text


def test_text_of_the_user_cannot_change_the_structure_of_the_card() -> None:
    """Markup, code and front matter in names and settings are shown as they are."""
    bad = "x`\n---\nlicense: mit\n---\n# y | <script>\x1b[31m" + '"); import os #'
    header = {"base": bad, "reward": bad}
    results = Results({bad: Change(0.0, 1.0, 0.1, 2)}, [bad], {bad: bad})
    card = ModelCard(model_card(bad, header, "StableDiffusionPipeline", 4, comfy=False, results=results))
    assert card.data.license == "other"
    assert "\x1b" not in card.content
    lines = card.text.splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == [
        "## Scores of 2 images of held-out prompts",
        "## Settings",
        "## Use in diffusers",
        "## License",
    ]
    assert "---" not in lines
    assert r"# x\` --- license: mit --- \# y \| \<script\>" in card.text
    code = card.text.partition("```python\n")[2].partition("\n```")[0]
    (call,) = (
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value != "."
    )
    assert call.args[0].value == bad


@pytest.mark.parametrize(
    ("base", "pipeline", "code"),
    [
        ("emoji64", "StableDiffusionPipeline", 'StableDiffusionPipeline.from_pretrained(resolve("emoji64"))'),
        ("a/b.safetensors", "StableDiffusionPipeline", 'StableDiffusionPipeline.from_single_file("a/b.safetensors")'),
        ("a/b", "PixArtSigmaPipeline", 'PixArtSigma("a/b", lora=None)'),
    ],
)
def test_code_of_the_card_opens_the_base_model(base: str, pipeline: str, code: str) -> None:
    text = model_card("x", {"base": base}, pipeline, 4, comfy=False)
    assert code in text
    assert ("load_lora_weights" in text) == hasattr(getattr(diffusers, pipeline), "load_lora_weights")


def test_interpolated_predictions_are_loaded_with_this_package() -> None:
    """diffusers can only scale the weights of adapters."""
    schedule = ScaleSchedule(power=2.0, interpolate="predictions")
    text = model_card("x", {"base": "a/b", "scale_schedule": schedule.to_text()}, "FluxPipeline", 4, comfy=False)
    assert 'Flux("a/b", lora=None)' in text
    assert "load_lora_weights" not in text
    schedule = ScaleSchedule(power=0.0, start=0.5, interpolate="predictions")
    text = model_card("x", {"base": "a/b", "scale_schedule": schedule.to_text()}, "FluxPipeline", 4, comfy=False)
    assert 'pipe.set_adapters("reward", {"transformer": scale(0, 1)})' in text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that speaks the part of the hub's protocol that creates a repository and commits small files."""
    received: dict[str, Any] = {"paths": [], "files": {}}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received["paths"].append(self.path)
            address = f"http://127.0.0.1:{self.server.server_address[1]}/me/bright"
            if self.path == "/api/repos/create":
                received["repository"] = json.loads(body)
                answer: Any = {"url": address}
            elif self.path == "/api/validate-yaml":
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                answer = {"files": modes}
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        received["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1" * 40}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", received
    server.shutdown()
    server.server_close()


def test_upload_creates_a_private_repository_with_card_and_files(hub: Any, tmp_path: Path) -> None:
    endpoint, received = hub
    (tmp_path / "images").mkdir()
    kept = {"README.md", "best.safetensors", "best.comfy.safetensors", "images/0.png", "images/before_after.png"}
    for name in (*kept, "notes.txt"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    url = push_to_hub(tmp_path, "me/bright", endpoint)
    assert url.endswith("/me/bright/commit/1")
    assert received["repository"]["name"] == "bright"
    assert "private" in {received["repository"].get("visibility"), *received["repository"]}
    assert received["files"] == {name: name.encode() * 3 for name in kept}


def test_a_repository_is_owner_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert check_repository("me/bright") == "me/bright"
    with pytest.raises(ConfigurationError, match="export.push_to_hub='bright' must be owner/name"):
        check_repository("bright")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE is set"):
        check_repository("me/bright")


def test_a_failed_upload_is_a_warning_that_names_the_command(hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Training has ended and its files are on the disk."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(
        UserWarning, match=r"the upload failed \(.*\); to repeat it, write hf upload --private me/bright"
    ):
        upload(tmp_path, "me/bright")


def test_an_upload_that_fails_without_a_message_is_a_warning(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr("lightning_draft.model_card.push_to_hub", fail)
    with pytest.warns(UserWarning, match=r"failed \(TimeoutError\); to repeat it, write hf upload --private me/bright"):
        upload(tmp_path, "me/bright")


def test_the_card_is_written_beside_the_file(tiny_sd: Path, tmp_path: Path) -> None:
    model = StableDiffusion(str(tiny_sd), lora=LoRA())
    write_card(model, tmp_path / "run" / "lora" / "best.safetensors", HEADER, comfy=True)
    text = (tmp_path / "run" / "lora" / "README.md").read_text(encoding="utf-8")
    assert text == model_card("run", HEADER, "StableDiffusionPipeline", 8, comfy=True)


def test_a_validation_records_the_change_of_each_score_with_its_standard_error() -> None:
    """Batches of different sizes, split over two processes, give the mean and error of all pairs."""
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 7, generator=generator)
    images = torch.rand(3, 3, 8, 8, generator=generator) * 1.2
    records = [ValidationRecord(["a", "b", "c"], images, 1 - images) for _ in range(2)]
    for record, part in ((records[0], slice(0, 3)), (records[0], slice(3, 4)), (records[1], slice(4, 7))):
        record.add({"reward": after[part]}, {"reward": before[part]})
    other = records[1]._sums["reward"]
    change = records[0].changes(lambda found: found + other)["reward"]
    gain = after - before
    assert change.before == pytest.approx(before.mean().item())
    assert change.after == pytest.approx(after.mean().item())
    assert change.error == pytest.approx((gain.std() / 7**0.5).item())
    assert change.count == 7
    assert torch.equal(records[0].images["fine-tuned"], images.clamp(0, 1))
