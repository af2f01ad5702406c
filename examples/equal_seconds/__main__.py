"""Compare settings of direct gradients at equal CPU seconds of training on the shipped model.

    python -m examples.equal_seconds few_steps
    python -m examples.equal_seconds length_50 --seeds 3

`few_steps` needs both models of `python -m examples.emoji_model.few_step`; comparisons with the clean images of the
captions need `python -m examples.emoji_model.data`. The time of evaluations is not counted.
`OUT/NAME.jsonl` has one line per finished run, and a second call continues there; `OUT/NAME.md` has means and standard
errors over the seeds, `OUT/NAME.png` the curves.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch

from examples.equal_seconds.experiments import experiments, truths
from examples.equal_seconds.measure import train
from examples.equal_seconds.report import plot, table
from examples.method_table.runs import RunFile
from lightning_draft.models import Guidance


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(experiments(Path())))
    parser.add_argument("--out", type=Path, default=Path("runs/equal_seconds"))
    parser.add_argument("--students", type=Path, default=Path("runs/emoji_few_step"))
    parser.add_argument("--seconds", type=float, help="CPU seconds of a run; the experiment has a default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16, help="evaluation prompts, two images each")
    parser.add_argument("--settings", nargs="+", help="labels of the settings to run; default: all")
    parser.add_argument("--clean-images", type=Path, default=Path("runs/emoji/emoji64.npz"))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the table and the figure."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(eval mode at the start|many workers|treespec).*")
    experiment = experiments(arguments.students)[arguments.experiment]
    seconds = arguments.seconds or experiment.seconds
    file = RunFile(arguments.out / f"{arguments.experiment}.jsonl")
    common = {"seconds": seconds, "prompts": arguments.prompts, "clean_images": arguments.clean_images.exists()}
    start, untrained = time.time(), dict[tuple[str, int, Guidance], dict[str, float]]()
    for seed in range(arguments.seeds):
        for order, (label, setting) in enumerate(experiment.settings.items()):
            identity = {"setting": label, "seed": seed, **common}
            if (arguments.settings and label not in arguments.settings) or file.find(**identity):
                continue
            chain = setting.model, setting.num_steps, setting.guidance
            scores = truths(arguments.clean_images)
            curve = train(experiment, setting, seed, scores, seconds, arguments.prompts, untrained.get(chain))
            untrained[chain] = curve.evaluations[0]
            run = file.add({**identity, "order": order, "evaluations": curve.evaluations, "curve": curve.curve})
            print(f"{time.time() - start:.0f} s  {label}  seed {seed}  {run['evaluations'][-1]}", flush=True)
    runs = [run for run in file.all() if common.items() <= run.items()]
    text = (
        f"{experiment.question} {seconds:.0f} CPU seconds a run, batch size {experiment.batch_size}.\n\n{table(runs)}"
    )
    (arguments.out / f"{arguments.experiment}.md").write_text(text)
    plot(runs, arguments.out / f"{arguments.experiment}.png")
    print(text)


if __name__ == "__main__":
    main()
