"""A run whose folder is moved or removed during training, or whose upload fails, keeps its files and says so."""

import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_draft.model_card import upload
from tests.cli.conftest import Result

LOSE = """\
from pathlib import Path
import shutil
from lightning.pytorch import Callback
class Lose(Callback):
    def __init__(self, move: bool):
        self.move = move
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 1:
            shutil.move("runs/small", "moved") if self.move else shutil.rmtree("runs/small")
"""


@pytest.mark.parametrize(("move", "logger"), [(True, "true"), (False, "CSVLogger")])
def test_a_folder_that_is_gone_is_created_again_with_its_config(
    command: Callable[..., Result], config: Path, move: bool, logger: str
) -> None:
    Path("lose.py").write_text(LOSE)
    options = ["--trainer.callbacks", "lose.Lose", "--trainer.callbacks.move", str(move).lower(), "--samples", "null"]
    options += ["--trainer.logger", logger, "--trainer.log_every_n_steps", "1"]
    result = command("fit", "--config", config, *options)
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    assert result.err.count("runs/small was moved or removed during training; it was created again at step 2") == 1
    names = {path.name for path in Path("runs/small").rglob("*")}
    assert names >= {"config.yaml", "last.ckpt", "last.safetensors", "best.safetensors"}
    assert any(name == "metrics.csv" or name.startswith("events.out") for name in names), names
    assert Path("moved/config.yaml").exists() == move


@pytest.fixture(params=["error", "closes", "silent"])
def broken_hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers each request with an error, closes the connection, or never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if request.param == "silent":
                continue
            connection.recv(65536)
            if request.param == "error":
                connection.sendall(b"HTTP/1.1 500 Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    for each in (listener, *held):
        each.close()


def _reach(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("lightning_draft.model_card._SILENCE", 0.5)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def test_an_upload_that_fails_ends_with_a_warning(
    broken_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reach(broken_hub, monkeypatch)
    with pytest.warns(UserWarning, match="to repeat it, write hf upload --private me/bright") as caught:
        assert not upload(tmp_path, "me/bright")
    assert "hf_test" not in str(caught[0].message)


def test_a_failed_upload_keeps_the_files_and_gives_status_1(
    command: Callable[..., Result], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reach("http://127.0.0.1:9", monkeypatch)
    options = ["--trainer.max_steps", "1", "--samples", "null", "--export.push_to_hub", "me/bright"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = command("fit", "--config", config, *options)
    assert result.status == 1
    assert "to repeat it, write hf upload --private me/bright runs/small/lora" in result.err
    assert "load_lora_weights" in result.out
    assert "resume:" not in result.out
    assert Path("runs/small/lora/last.safetensors").is_file()
    assert Path("runs/small/checkpoints/last.ckpt").is_file()
