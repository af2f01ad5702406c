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
from huggingface_hub import ModelCard

from lightning_draft.errors import ConfigurationError
from lightning_draft.model_card import check_repository, model_card, push_to_hub, upload, write_card
from lightning_draft.models import LoRA, StableDiffusion

HEADER = {
    "base": "runwayml/some-model",
    "base_sha256": "ab" * 32,
    "reward": "Brightness()",
    "step": "12",
    "scores": json.dumps({"val/reward": 0.75, "val/gain": 0.5, "val/judge": 2.0, "train/reward": 9.0}),
}


def test_the_card_has_the_front_matter_that_the_hub_reads() -> None:
    card = ModelCard(model_card("bright", HEADER, "StableDiffusionPipeline", 4, comfy=True))
    assert card.data.base_model == "runwayml/some-model"
    assert {"lora", "text-to-image"} <= set(card.data.tags)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {"reward": 0.75, "judge": 2.0}
    assert "| reward | 0.25 | 0.75 |" in card.text
    assert "| judge |  | 2 |" in card.text
    assert 'load_lora_weights(".", weight_name="best.safetensors")' in card.text
    assert "best.comfy.safetensors" in card.text
    assert "- rank: `4`" in card.text


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
    header = {"base": bad, "reward": bad, "scores": json.dumps({f"val/{bad}": 1.0})}
    card = ModelCard(model_card(bad, header, "StableDiffusionPipeline", 4, comfy=False))
    assert card.data.license == "other"
    assert "\x1b" not in card.content
    lines = card.text.splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == [
        "## Scores on held-out prompts",
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
    for name in ("README.md", "best.safetensors", "best.comfy.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    url = push_to_hub(tmp_path, "me/bright", endpoint)
    assert url.endswith("/me/bright/commit/1")
    assert received["repository"]["name"] == "bright"
    assert "private" in {received["repository"].get("visibility"), *received["repository"]}
    names = {"README.md", "best.safetensors", "best.comfy.safetensors"}
    assert received["files"] == {name: name.encode() * 3 for name in names}


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
