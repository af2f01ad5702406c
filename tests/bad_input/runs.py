"""Names of runs, and checkpoints to continue from."""

import zipfile
from pathlib import Path

import torch

from lightning_draft.cli.checkpoint_file import find_checkpoint
from lightning_draft.cli.option_checks import check_options
from lightning_draft.cli.run_folder import check_name
from tests.bad_input.cases import Case, Content, python

RUN_NAMES = "Names of runs"
CHECKPOINTS = "Checkpoints"
NAMES = [
    *("../x", "../../x", "..", ".", "", "/absolute/x", "a//b", "a/../b", "a/", "~/x", "~root", "./x", "a/./b"),
    *(
        "a\nb",
        "a\x1b[31mb",
        "a\tb",
        "a\u202eb",
        "a\x00b",
        "a\x7fb",
        "a\u2028b",
        " a",
        "a ",
        "a\\b",
        "-rf",
        "x" * 300,
        "\u00e9" * 150,
    ),
]


def _name(name: str) -> Case:
    shown = repr(name) if len(name) < 60 else f"{name[:10]!r}... ({len(name)} letters)"
    return python(RUN_NAMES, f"--name {shown}", lambda _: check_name(name), "--name=", "write a name such as my-run")


def _checkpoint(path: str, *says: str, content: Content | None = None, shown: str = "") -> Case:
    files = {} if content is None else {path: content}
    return python(CHECKPOINTS, shown or f"--ckpt_path {path}", lambda _: find_checkpoint(path), *says, files=files)


def _foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _cut(path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 3}, path)
    path.write_bytes(path.read_bytes()[:300])


def _flipped(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(64)}, "global_step": 3}, path)
    path.write_bytes(path.read_bytes().replace(torch.ones(8).numpy().tobytes(), torch.zeros(8).numpy().tobytes(), 1))


CASES: list[Case] = [
    *map(_name, NAMES),
    _checkpoint("https://example.org/last.ckpt", "'https://example.org/last.ckpt' is remote", "download a checkpoint"),
    _checkpoint("s3://bucket/last.ckpt", "is remote", "download a checkpoint"),
    _checkpoint("hf://someone/model/last.ckpt", "is remote", "download a checkpoint"),
    _checkpoint("file:///data/last.ckpt", "must be a path and not a URL", "write /data/last.ckpt"),
    _checkpoint("registry", "is not supported", "`last` for the newest run"),
    _checkpoint("hpc", "--ckpt_path=hpc is not supported", "use --resume auto"),
    _checkpoint("best", "there is no checkpoint best", "`last` for the newest run"),
    _checkpoint("", "--ckpt_path"),
    _checkpoint("empty.ckpt", "empty.ckpt is empty", "runs/NAME/checkpoints/last.ckpt", content=b""),
    _checkpoint(
        "text.ckpt", "text.ckpt is not a checkpoint", "runs/NAME/checkpoints/last.ckpt", content="not a checkpoint"
    ),
    _checkpoint("cut.ckpt", "cut.ckpt is not a checkpoint or is incomplete", content=_cut),
    _checkpoint("flipped.ckpt", "flipped.ckpt is damaged", "checksum", "copy it again", content=_flipped),
    _checkpoint(
        "foreign.ckpt", "foreign.ckpt is not a checkpoint: it is another kind of zip file", content=_foreign_zip
    ),
    _checkpoint(
        "weights.ckpt",
        "weights.ckpt is not a checkpoint of a training run",
        "contains no training step",
        content=lambda path: torch.save({"w": torch.zeros(2)}, path),
    ),
    _checkpoint(
        "list.ckpt", "list.ckpt is not a checkpoint of a training run", content=lambda path: torch.save([1, 2], path)
    ),
    _checkpoint("lora.safetensors", "lora.safetensors is not a checkpoint", content=b"\x08\0\0\0\0\0\0\0{}"),
    _checkpoint(
        "folder",
        "the folder folder has no checkpoint",
        "give a run's folder or a file",
        content=lambda path: path.mkdir(),
    ),
    python(
        "Secrets",
        "a config with --model.reward.url REDACTED",
        lambda _: check_options({"model.reward.url": "https://host/?api_key=REDACTED"}),
        "--model.reward.url",
        "without its secrets",
        "give the value again with --model.reward.url VALUE",
    ),
]
