"""Run folders are exclusive, inside `runs` and never overwritten; resuming checks changes."""

import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_draft.cli import run_folder
from lightning_draft.cli.run_record import changed_options, check_changes, decisive_changes
from lightning_draft.errors import ConfigurationError
from lightning_draft.redaction import redact


def _checkpoint(folder: Path, step: int = 1) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step}, folder / "checkpoints" / "last.ckpt")
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", ["small", "a.b", "lr[1]", "group/small"])
def test_runs_with_the_same_name_are_numbered(tmp_path: Path, name: str) -> None:
    assert run_folder.create(tmp_path, name).path == tmp_path / name
    for folder in (f"{name}-2", f"{name}-10", f"{name}-other"):
        (tmp_path / folder).mkdir(parents=True)
    assert run_folder.create(tmp_path, name).path == tmp_path / f"{name}-11"
    names = [path.name for path in run_folder.existing(tmp_path, name)]
    assert names == [Path(name).name + number for number in ("", "-2", "-10", "-11")]


def test_runs_that_start_together_get_separate_folders(tmp_path: Path) -> None:
    barrier, folders = threading.Barrier(16), []

    def start() -> None:
        barrier.wait()
        folders.append(run_folder.create(tmp_path, "a/same").path)

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 16


def test_file_at_the_path_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "group").touch()
    with pytest.raises(ConfigurationError, match="group is not a folder"):
        run_folder.create(tmp_path, "group/small")


def test_last_is_the_newest_run_not_the_newest_file(tmp_path: Path) -> None:
    old, new = _checkpoint(tmp_path / "small"), _checkpoint(tmp_path / "small-2")
    os.utime(new, ns=(0, 0))
    assert run_folder.newest(tmp_path, "small") == run_folder.RunFolder(tmp_path / "small-2", new)
    new.unlink()
    with pytest.raises(ConfigurationError, match=r"no checkpoint in .*small-2, the newest run; .*--ckpt_path .*small"):
        run_folder.newest(tmp_path, "small")
    assert old.exists()


def test_unfinished_file_of_a_killed_process_is_not_a_checkpoint(tmp_path: Path) -> None:
    unfinished = tmp_path / "checkpoints" / ".last.4711.partial.ckpt"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"PK")
    assert run_folder.start_or_resume(tmp_path).checkpoint is None
    saved = _checkpoint(tmp_path)
    os.utime(saved, ns=(0, 0))
    assert run_folder.start_or_resume(tmp_path).checkpoint == saved


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_broken_checkpoint_is_an_error_for_every_way_to_name_it(tmp_path: Path, content: bytes) -> None:
    _checkpoint(tmp_path / "small").write_bytes(content)
    for find in (run_folder.resume, run_folder.start_or_resume):
        with pytest.raises(ConfigurationError, match=r"last.ckpt is (empty|not a checkpoint)"):
            find(tmp_path / "small")
    with pytest.raises(ConfigurationError, match=r"last.ckpt is (empty|not a checkpoint)"):
        run_folder.newest(tmp_path, "small")


def test_only_one_process_can_train_in_a_folder(tmp_path: Path) -> None:
    with run_folder.locked(tmp_path):
        with pytest.raises(ConfigurationError, match="another process is training"), run_folder.locked(tmp_path):
            pass
        with run_folder.locked(tmp_path.parent):
            pass
    with run_folder.locked(tmp_path):
        pass


def test_start_or_resume_continues_in_the_folder_of_the_first_start(tmp_path: Path) -> None:
    first = run_folder.start_or_resume(tmp_path / "job")
    assert first == run_folder.RunFolder(tmp_path / "job", None, created=True)
    file = _checkpoint(tmp_path / "job")
    assert run_folder.start_or_resume(tmp_path / "job") == run_folder.RunFolder(tmp_path / "job", file)


def test_discard_removes_only_unused_folders_that_it_created(tmp_path: Path) -> None:
    run = run_folder.create(tmp_path / "runs", "small")
    (run.path / "config.yaml").touch()
    run_folder.discard(run_folder.RunFolder(run.path))
    assert run.path.exists()
    run_folder.discard(run)
    assert not (tmp_path / "runs").exists()
    run = run_folder.create(tmp_path / "runs", "small")
    _checkpoint(run.path)
    run_folder.discard(run)
    assert run.path.exists()


def _config(**changes: object) -> dict:
    arguments = {
        "model": {"class_path": "SD", "init_args": {"pretrained": "emoji64", "lora": {"rank": 2, "alpha": 2.0}}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3, "betas": (0.9, 0.999)}},
        "lr_scheduler": None,
        "kl_weight": 0.0,
    }
    return {"name": "x", "model": {"class_path": "DraftModule", "init_args": {**arguments, **changes}}}


def _model(pretrained: str = "emoji64", **lora: object) -> dict:
    adapters = {"rank": 2, "alpha": 2.0, **lora}
    return {"class_path": "SD", "init_args": {"pretrained": pretrained, "lora": adapters}}


INVALID = [
    ({"model": _model(alpha=4.0)}, "--model.model.lora.alpha: .*2.0 .*4.0"),
    ({"model": _model(rank=4)}, "--model.model.lora.rank"),
    ({"model": _model("other")}, "--model.model.pretrained: .*'emoji64' .*'other'"),
    ({"model": {"class_path": "SD3", "init_args": {"pretrained": "emoji64"}}}, "--model.model"),
    ({"optimizer": {"class_path": "SGD", "init_args": {"lr": 1e-3}}}, "--model.optimizer.class_path"),
    ({"lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 2}}}, "--model.lr_scheduler"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_invalid_changes_of_a_resumed_run_are_errors(changes: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_changes(changed_options(_config(), _config(**changes)), _config(**changes))


def test_an_option_that_an_older_release_lacks_is_no_change_while_it_is_off() -> None:
    newer = {"merge": False, "schedule": None}
    assert changed_options(_config(), _config(model=_model(**newer))) == {}
    assert set(changed_options(_config(), _config(model=_model(merge=True, dropout=0)))) == {
        "model.model.lora.merge",
        "model.model.lora.dropout",
    }
    assert set(changed_options(_config(model=_model(**newer)), _config())) == {"model.model.lora.merge"}


def test_valid_changes_of_a_resumed_run_are_accepted() -> None:
    new = _config(kl_weight=0.5, optimizer={"class_path": "AdamW", "init_args": {"lr": 1e-4, "betas": [0.9, 0.999]}})
    changes = changed_options(_config(), {**new, "name": "y", "trainer": {"max_steps": 9}})
    expected = {"model.kl_weight": (0.0, 0.5), "model.optimizer.lr": (1e-3, 1e-4), "trainer.max_steps": (None, 9)}
    assert changes == expected
    check_changes(changes, new)
    assert set(decisive_changes(changes)) == {"model.kl_weight", "model.optimizer.lr"}
    assert not decisive_changes({"model.model.text.cache": (None, "embeddings")})  # it does not change embeddings
    new["model"]["init_args"]["lr_scheduler"] = {"class_path": "StepLR"}
    with pytest.raises(ConfigurationError, match="is set by its lr_scheduler"):
        check_changes(changes, new)


def test_rejected_resume_changes_nothing_and_valid_change_is_applied_and_recorded(
    command: Callable, config: Path
) -> None:
    assert command("fit", "--config", config, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.001").status == 0
    run = Path("runs/small")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = ["fit", "--config", run, "--ckpt_path", "last", "--trainer.max_steps", "4"]
    rejected = command(*more, "--model.model.lora.alpha", "7")
    assert rejected.status == 2
    assert "--model.model.lora.alpha" in rejected.err
    assert {path: path.read_bytes() for path in before} == before
    resumed = command(*more, "--model.optimizer.lr", "0.0005")
    assert resumed.status == 0, resumed.err
    assert "continuing from runs/small/checkpoints/last.ckpt" in resumed.out
    assert "changed since the checkpoint: --model.optimizer.lr 0.001 -> 0.0005" in resumed.out
    assert "because training depends on --model.optimizer.lr\n" in resumed.err
    state = torch.load(run / "checkpoints/last.ckpt")
    assert state["global_step"] == 4
    assert [group["lr"] for group in state["optimizer_states"][0]["param_groups"]] == [0.0005]
    assert (run / "config.yaml").read_bytes() == before[run / "config.yaml"]
    text = (run / "config-resume-1.yaml").read_text()
    assert text.startswith("# --trainer.max_steps: 2 -> 4\n")
    assert yaml.safe_load(text)["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.0005


SIGNALS = """
import lightning as L, os, signal
class Warn(L.Callback):
    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 1 and not os.path.exists("warned"):
            open("warned", "w").close()
            os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.fixture
def slurm(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate SLURM: the variables of a job, and a `scontrol` that writes its arguments to a file."""
    scontrol = workplace / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {workplace}/requeued\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    job = {"JOB_ID": "17", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return workplace / "requeued"


def test_same_command_starts_and_continues_after_the_slurm_signal(command: Callable, config: Path, slurm: Path) -> None:
    Path("signals.py").write_text(SIGNALS)
    job = ["fit", "--config", config, "--trainer.max_steps", "4", "--trainer.callbacks", "[signals.Warn]"]
    first = command(*job, "--name", "job", "--resume", "auto")
    assert first.status == 143, first.err
    assert "stopped by SIGUSR1 after 2 steps" in first.err
    assert slurm.read_text() == "requeue 17\n"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    second = command(*job, "--name", "job", "--resume", "auto")
    assert second.status == 0, second.err
    assert {path.name for path in Path("runs").iterdir()} == {"job"}
    assert command(*job, "--name", "whole").status == 0
    job_state, whole = (torch.load(f"runs/{name}/checkpoints/last.ckpt") for name in ("job", "whole"))
    assert job_state["global_step"] == whole["global_step"] == 4
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, job_state["state_dict"][name])
    files = [load_file(Path("runs") / name / "lora/last.safetensors") for name in ("job", "whole")]
    assert all(torch.equal(value, files[0][name]) for name, value in files[1].items())
    third = command(*job, "--name", "job", "--resume", "auto")
    assert third.status == 0, third.err


SECRETS = [
    ("https://user:pw@host/path?api_key=abc&size=3", "https://REDACTED@host/path?api_key=REDACTED&size=3"),
    ("https://host/?key=abc", "https://host/?key=REDACTED"),
    ("https://host/?x=1", "https://host/?x=1"),
    ("http://[broken", "http://[broken"),
    ("a cat: 50% off?", "a cat: 50% off?"),
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_in_urls_are_removed(text: str, shown: str) -> None:
    assert redact({"url": [text]}) == {"url": [shown]}


def test_secrets_are_removed_by_the_name_of_the_option() -> None:
    secret = {"api_key": "a", "hf_token": "b", "headers": {"Authorization": "Bearer c"}, "wandb": {"password": "d"}}
    assert "'a'" not in str(redact(secret))
    assert redact(secret)["headers"] == {"Authorization": "REDACTED"}
    kept = {"tokens": "x", "num_token": 3, "token": None, "column": "key", "monitor": "val/reward", "k": 3}
    assert redact(kept) == kept
