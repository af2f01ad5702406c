"""Two runs and a resume with each logger: loggers only log, inside the run folder that the command line owns."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input import runner
from tests.bad_input.cases import built

CUSTOM = """
from pathlib import Path
from lightning.pytorch.loggers.logger import DummyLogger
class FileLogger(DummyLogger):
    def __init__(self, save_dir: str = "./mlruns", project: str = "p"):
        super().__init__()
        self._dir = save_dir
    @property
    def save_dir(self):
        return self._dir
    def log_metrics(self, metrics, step=None):
        Path(self._dir).mkdir(parents=True, exist_ok=True)
        with open(Path(self._dir) / "metrics.txt", "a") as file:
            file.write(f"{step} {sorted(metrics)}\\n")
"""


def _train(command: Callable, config: Path, *options: str, after: Callable[[], object] = lambda: None) -> None:
    """Run twice and resume the second run; check the folders and that nothing else was written."""
    Path("config.yaml").write_text("# written by hand\n")
    before = {path.name for path in Path().iterdir()}
    args = ["fit", "--config", config, *options]
    for _ in range(2):
        result = command(*args)
        after()
        assert result.status == 0, result.err
    resumed = command(*args, "--ckpt_path", "last", "--trainer.max_steps", "3")
    after()
    assert resumed.status == 0, resumed.err
    assert "run folder: runs/small-2" in resumed.out
    assert "continuing from runs/small-2/checkpoints/last.ckpt" in resumed.out
    assert {path.name for path in Path("runs").iterdir()} == {"small", "small-2"}
    for run in ("small", "small-2"):
        assert {path.name for path in (Path("runs") / run).iterdir()} >= {
            "config.yaml",
            "checkpoints",
            "lora",
            "samples",
        }
        assert (Path("runs") / run / "lora" / "images" / "before_after.png").is_file()
    assert Path("config.yaml").read_text() == "# written by hand\n"
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {*before, "runs"}


@pytest.mark.parametrize(
    ("logger", "first", "second"),
    [
        ("CSVLogger", ["csv/version_0/metrics.csv"], ["csv/version_0/metrics.csv", "csv/version_1/metrics.csv"]),
        ("TensorBoardLogger", ["events.*"], ["events.*"]),
        ("mine.FileLogger", ["metrics.txt"], ["metrics.txt"]),
    ],
)
def test_loggers_only_log_and_inside_the_run_folder(
    command: Callable, config: Path, logger: str, first: list[str], second: list[str]
) -> None:
    Path("mine.py").write_text(CUSTOM)
    _train(command, config, "--trainer.logger", logger)
    for run, patterns in (("small", first), ("small-2", second)):
        assert all([*(Path("runs") / run).glob(pattern)] for pattern in patterns)


def _complete(file: Path) -> bytes:
    """Return a file that W&B's background process has finished writing; in a run this happens when Python exits."""
    for _ in range(100):
        if file.stat().st_size > 1000:
            break
        time.sleep(0.1)
    return file.read_bytes()


def test_wandb_offline_logs_images_and_the_best_lora_inside_the_run_folder(command: Callable, config: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = "{class_path: WandbLogger, init_args: {offline: true, project: small}}"
    _train(command, config, "--trainer.logger", logger, after=wandb.finish)
    for run, count in (("small", 1), ("small-2", 2)):
        runs = [*(Path("runs") / run / "wandb").glob("offline-run-*")]
        assert len(runs) == count
        for folder in runs:
            assert [*folder.glob("*.wandb")]
            assert [*folder.glob("files/media/images/samples_*.png")]
            content = _complete(next(folder.glob("*.wandb")))
            assert all(name in content for name in (b"best.safetensors", b"best.comfy.safetensors", b"README.md"))


@pytest.mark.parametrize("uri", [None, "sqlite:///{folder}/mlflow.db"])
def test_mlflow_logs_images_and_the_best_lora(
    command: Callable, config: Path, uri: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A store in the run folder, or one database of the user's for all runs."""
    mlflow = pytest.importorskip("mlflow")
    store = tmp_path_factory.mktemp("store")
    place = "" if uri is None else f"tracking_uri: '{uri.format(folder=store)}', artifact_location: '{store}/files', "
    logger = f"{{class_path: MLFlowLogger, init_args: {{{place}experiment_name: small}}}}"
    _train(command, config, "--trainer.logger", logger)
    own = [f"sqlite:///{Path.cwd()}/runs/{run}/mlflow.db" for run in ("small", "small-2")]
    stores = own if uri is None else [uri.format(folder=store)]
    seen = []
    for address in stores:
        client = mlflow.MlflowClient(address)
        (experiment,) = [e for e in client.search_experiments() if e.name == "small"]
        seen += [(client, run) for run in client.search_runs([experiment.experiment_id])]
    assert len(seen) == 3
    for client, run in seen:
        assert "train/reward" in run.data.metrics
        files = {file.path for file in client.list_artifacts(run.info.run_id, "lora")}
        assert files == {f"lora/{name}" for name in ("best.safetensors", "best.comfy.safetensors", "README.md")}
        assert client.list_artifacts(run.info.run_id, "images")


def test_loggers_in_a_list_write_to_the_run_folder(tmp_path: Path) -> None:
    outcome = runner.run(built("", ["--trainer.logger", "[CSVLogger, TensorBoardLogger]"]), tmp_path)
    assert outcome.status == 0, outcome
    assert "runs/small/csv/version_0/metrics.csv" in outcome.changed
    assert any(name.startswith("runs/small/events.out.") for name in outcome.changed)


def test_a_folder_of_runs_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcome = runner.run(built("", "--trainer.default_root_dir ~/x --trainer.logger false"), tmp_path)
    assert outcome.status == 0, outcome
    assert {"home/x/small/config.yaml", "home/x/small/checkpoints/last.ckpt"} <= set(outcome.changed)
    assert not any(name.startswith(("~", "runs")) for name in outcome.changed)
