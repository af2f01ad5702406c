"""Peak memory of a process that embeds a large prompt set with `text.cache`, and of one that reads it.

    python -m benchmarks.text_cache
    python -m benchmarks.text_cache --prompts 100000 --folder cache

The text encoder is a CLIP without layers and with random weights, whose embeddings have the size of those of Stable
Diffusion 1.5: 77 tokens of 768 numbers. With `--folder`, an interrupted benchmark continues.
"""

import argparse
import random
import re
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from lightning_draft.models import StableDiffusion, TextEncoding
from lightning_draft.weightless import without_weights

MIB = 2**20


def peak_resident() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def open_model(folder: Path, cache: Path, dtype: str) -> StableDiffusion:
    """Open the model as `fit` does before it embeds the prompts: without the weights of the other networks."""
    with without_weights():
        return StableDiffusion(str(folder), lora=None, dtype=dtype, text=TextEncoding(cache=str(cache)))  # type: ignore[arg-type]


def write_pipeline(folder: Path) -> None:
    """Write a tiny pipeline whose embeddings are large."""
    tiny = common.SIZES["tiny"]
    text = {**tiny["text"], "hidden_size": 768, "num_hidden_layers": 0, "intermediate_size": 64}
    common.write_networks(folder, unet={**tiny["unet"], "cross_attention_dim": 768}, vae=tiny["vae"], text=text)


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000, help="number of prompts")
    parser.add_argument("--batch", type=int, default=8, help="prompts that are read at a time")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the text encoder and its embeddings")
    parser.add_argument(
        "--folder", type=Path, help="folder of the embeddings, which is kept; by default a temporary one"
    )
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    arguments = parser.parse_args()
    common.quiet()
    torch.set_num_threads(1)
    prompts = [f"a photo of the animal with the number {number}" for number in range(arguments.prompts)]
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.folder or Path(temporary) / "cache"
        pipeline = Path(temporary) / "model"
        write_pipeline(pipeline)
        rows = [["before", f"{peak_resident():.0f}", ""]]
        start = time.perf_counter()
        open_model(pipeline, cache, arguments.dtype).precompute(prompts)
        rows.append(["all prompts embedded", f"{peak_resident():.0f}", f"{time.perf_counter() - start:.0f}"])
        random.Random(0).shuffle(prompts)
        start, model = time.perf_counter(), open_model(pipeline, cache, arguments.dtype)
        for first in range(0, len(prompts), arguments.batch):
            size = len(model.encode(prompts[first : first + arguments.batch]))
        rows.append(
            ["all prompts read in random order", f"{peak_resident():.0f}", f"{time.perf_counter() - start:.0f}"]
        )
        stored = sum(file.stat().st_size for file in cache.rglob("*.safetensors"))
    assert size > 0
    title = f"{len(prompts)} prompts, {stored / MIB / 1024:.2f} GiB of embeddings in {arguments.dtype}."
    head = ["process", "peak resident memory, MiB", "seconds"]
    common.show(f"{title}\n\n{common.table(head, rows)}", arguments.output)


if __name__ == "__main__":
    main()
