"""The short pages that help opens with."""

MAIN = """\
lightning-draft: fine-tune a text-to-image diffusion model on a reward, through its sampler

  lightning-draft fit --config quickstart          train; a shipped config by name, or a YAML file
  lightning-draft sample runs/quickstart           pictures before and after, same prompts and noise
  lightning-draft validate --config runs/NAME --ckpt_path last
                                                   score held-out prompts
  lightning-draft configs list                     the shipped configs, a line each
  lightning-draft configs show NAME                one of them, to copy and change
  lightning-draft --version

`lightning-draft fit --help` is the next page."""

FIT = """\
lightning-draft fit: train

  lightning-draft fit --config quickstart
  lightning-draft fit --config draft_k --model.truncation.k 3 --trainer.max_steps 200
  lightning-draft fit --config quickstart --config mine.yaml     later files win, options win over files
  lightning-draft fit --config quickstart --ckpt_path last       go on where the newest run of it ended

  --config NAME|FILE       a shipped config, a YAML file, or a run's folder
  --name NAME              the run writes to runs/NAME; by default the config's name, with -2, -3 ... for more runs
  --model.KEY VALUE        the method: model, reward, sampler, truncation, loss, objective, optimizer, ...
  --data.KEY VALUE         the prompts: prompts, val_prompts, batch_size, ...
  --trainer.KEY VALUE      every option of Lightning's Trainer: max_steps, precision, devices, strategy, ...
  --samples.KEY VALUE      grids of pictures; `--samples null` for none; likewise --export (LoRA files),
                           --gradients (norms), --cost (queries, passes, seconds), --checkpoint (to resume from),
                           --progress; and none by default: --ema (moving average), --guard (held-out rewards that
                           fall), --conflict (of rewards): --guard OverOptimisationGuard --guard.action stop
  --ckpt_path FILE|last    resume
  --print_config           print the whole configuration and stop

Classes are given by name (LastK, DDIM, CLIPScore, WeightedSum), your own by module and name: my_rewards.Redness is
class Redness in my_rewards.py in the current folder.

  --help_all               every option
  --model.help DraftModule, --model.help PolicyGradientModule, --samples.help SampleLogger
                           the options of one class"""

VALIDATE = """\
lightning-draft validate: score held-out prompts, beside the base model on the same noise

  lightning-draft validate --config runs/quickstart --ckpt_path last

  --config NAME|FILE       a shipped config, a YAML file, or a run's folder
  --ckpt_path FILE|last    the checkpoint; without one the base model is scored
  --model.KEY, --data.KEY, --trainer.KEY
                           as for fit
  --help_all               every option"""

CONFIGS = """\
lightning-draft configs list         the shipped configs, a line each
lightning-draft configs show NAME    one of them, to copy and change"""

SAMPLE = """\
lightning-draft sample: pictures from the same prompts and noise at several scales of a LoRA file

  lightning-draft sample runs/quickstart
  lightning-draft sample lora.safetensors --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a cat"

  LORA                     a .safetensors file, or a run's folder: then its best adapters
  --config NAME|FILE       the config that describes the model, sampler and reward; by default the run's own
  --model NAME             instead of a config: a shipped name, a pipeline's folder or file, or a hub id
  --scale S [S ...]        multiples of the LoRA, 0 is the base model; by default 0 1
  --prompt P [P ...]       by default the config's held-out prompts
  --prompts FILE|NAME      or a prompt file or shipped list
  --seed N [N ...]         of the starting noise, by default 0
  --max N                  at most this many prompts, by default 8
  --steps N                sampling steps, by default the config's, or 50 (28 for Stable Diffusion 3)
  --output FILE            by default sample.png
  --device NAME            by default cuda where there is one, else cpu"""

VERBS = {"fit": FIT, "validate": VALIDATE, "sample": SAMPLE}
