"""The help pages of the commands."""

from lightning_draft.cli.callback_options import help_lines

MAIN = """\
lightning-draft: fine-tune a text-to-image diffusion model on a reward, by back-propagating through its sampler

  lightning-draft fit --config quickstart          train; the config is a shipped name or a YAML file
  lightning-draft sample runs/quickstart           generate images with the base and the fine-tuned model
  lightning-draft guide --config quickstart        try a reward without training: best of n, guidance, ...
  lightning-draft validate --config runs/quickstart --ckpt_path last
                                                   score a checkpoint on held-out prompts
  lightning-draft score FOLDER --reward NAME       score existing images
  lightning-draft vote FOLDER                      compare images yourself, on a local page
  lightning-draft lora info FILE                   inspect, convert, scale, mix, anneal and merge LoRA files
  lightning-draft plan --config NAME               memory and cost of a training step, without the model's weights
  lightning-draft configs list                     list the shipped configs
  lightning-draft configs show NAME                print one, so that you can copy and change it
  lightning-draft completion bash                  print the tab completion of bash or zsh
  lightning-draft --version                        print the version

Each command has a help page: lightning-draft fit --help. With --verbose, or the environment variable
LIGHTNING_DRAFT_VERBOSE=1, a command also prints the notices of Lightning and torch."""

FIT = (
    """\
lightning-draft fit: train

  lightning-draft fit --config quickstart
  lightning-draft fit --config draft_k --model.truncation.k 3 --trainer.max_steps 200
  lightning-draft fit --config quickstart --config mine.yaml     options override files, later files earlier ones
  lightning-draft fit --config runs/quickstart --ckpt_path last  continue this run

Run
  --config NAME|FILE    a shipped config, a YAML file, or a run's folder
  --name NAME           write to runs/NAME; by default the config's name; a second run writes to runs/NAME-2
  --ckpt_path PATH|last continue from a checkpoint, a run's folder, or the newest run of this name
  --resume auto         continue from the checkpoint in runs/NAME if there is one, else start a new run (for clusters)
  --seed_everything N   the seed of noise, prompt order and adapters, by default 0; see --help_all
  --print_config        print the whole configuration and stop

Options of classes
  --model.KEY VALUE     the method: model, reward, sampler, truncation, loss, objective, optimizer, ...
  --data.KEY VALUE      the prompts: prompts, val_prompts, batch_size, ...
  --trainer.KEY VALUE   Lightning's Trainer: max_steps, precision, devices, strategy, ...

Callbacks: --samples.every_n_steps 50 sets an option of a callback, --samples null removes the callback
"""
    + "\n".join(help_lines())
    + """

Write a class by name (LastK, DDIM, CLIPScore, WeightedSum), and your own class by module and name: my_rewards.Redness
is the class Redness in my_rewards.py in the current folder. Importing it runs the code of that module.

More help
  --help_all            every option
  --model.help DraftModule, --model.reward.help CLIPScore, --samples.help SampleLogger
                        the options of one class"""
)

VALIDATE = """\
lightning-draft validate: score held-out prompts; prints the mean of each reward for the fine-tuned and the base model

  lightning-draft validate --config runs/quickstart --ckpt_path last

  --config NAME|FILE     a shipped config, a YAML file, or a run's folder
  --ckpt_path PATH|last  the checkpoint; without it the base model is scored
  --model.KEY VALUE, --data.KEY VALUE, --trainer.KEY VALUE
                         as for fit
  --help_all             every option"""

CONFIGS = """\
lightning-draft configs list         list the shipped configs
lightning-draft configs show NAME    print one, so that you can copy and change it"""

COMPLETION = """\
lightning-draft completion bash|zsh    print the tab completion; load it in each shell with
  eval "$(lightning-draft completion bash)"    in ~/.bashrc, or with zsh in ~/.zshrc"""

SAMPLE = """\
lightning-draft sample: generate images of the same prompts and noise with the base model and with a LoRA file

  lightning-draft sample runs/quickstart
  lightning-draft sample lora.safetensors --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a cat"

  LORA                  a .safetensors file, or a run's folder for its best LoRA file
  --config NAME|FILE    the config of the model, sampler and reward; by default the one in the run's folder
  --model NAME          instead of a config: a shipped model, a pipeline's folder or file, or a hub id
  --scale S [S ...]     scales of the LoRA: 0 is the base model, 1 the fine-tuned one; by default 0 1. With three or
                        more scales (0,0.5,1,1.5) and a reward, a plot of rewards against the scale is written too, and
                        the scale with the best evaluation reward is printed
  --schedule SCHEDULE   scale as a function of the sampling step: linear, power_2, step_0.6 (the base model for the
                        first 60 % of the steps), or scales of equal parts of the chain, such as 0,0.5,1
  --interpolate WHAT    what the schedule interpolates: weights (default), or predictions of both models
  --reward NAME ...     further rewards to evaluate, with their default arguments
  --rewards FILE        the same from a YAML file that maps names to rewards, as for score
  --prompt P [P ...]    prompts, or class numbers for a model of classes; by default the held-out prompts of the config
  --prompts FILE|NAME   the prompts of a file, or of a shipped list
  --seed N [N ...]      seeds of the starting noise; by default 0
  --max N               use at most N prompts; by default 8
  --steps N             sampling steps; by default the config's, else 50 (28 for flows, 2 for Sana-Sprint)
  --height N, --width N size of the images in pixels, with --model; by default the size the model was trained for
  --output FILE         the image file; by default sample.png
  --device NAME         cpu, cuda, ...; by default cuda if available"""

GUIDE = """\
lightning-draft guide: images with a higher reward from the base model, by methods that need no training

  lightning-draft guide --config quickstart
  lightning-draft guide runs/quickstart --method best_of_n:16 gradient:1 gradient:3
  lightning-draft guide --model emoji64 --rewards rewards.yaml --prompts emoji64_eval --steps 10

  --method NAME[:VALUE] ...   by default all that the reward allows:
                        best_of_n:8        the best of 8 samples; the reward needs no gradient
                        gradient:1         gradient of the reward of the predicted image at each step, times 1
                        norm_matched:0.1   each step moves along the gradient by 0.1 of its length (PGDiff)
                        reno:10            10 updates of the starting noise (ReNO)
                        dno:10             10 updates of all noise of the sampler (DNO)
  LORA                  a .safetensors file, or a run's folder for its best LoRA file, for comparison
  --config NAME|FILE    the config of the model, sampler and rewards; by default the one in the run's folder
  --model NAME          instead of a config: a shipped model, a pipeline's folder or file, or a hub id
  --reward NAME ...     rewards with their default arguments; without a config, the first one is increased and the
                        others are for evaluation
  --rewards FILE        the same from a YAML file that maps names to rewards, as for score
  --prompt P [P ...]    prompts, or class numbers for a model of classes; by default the held-out prompts of the config
  --prompts FILE|NAME   the prompts of a file, or of a shipped list
  --seed N [N ...]      seeds of the starting noise; by default 0
  --max N               use at most N prompts; by default 8
  --steps N             sampling steps; by default the config's, else 50 (28 for flows, 2 for Sana-Sprint)
  --height N, --width N size of the images in pixels, with --model; by default the size the model was trained for
  --output FILE         the image file, by default guide.png; scores and costs are written beside it as .csv and .json
  --device NAME         cpu, cuda, ...; by default cuda if available"""

SCORE = """\
lightning-draft score: score folders of existing images with rewards, without a diffusion model

  lightning-draft score images --reward AestheticScore
  lightning-draft score base fine_tuned --rewards rewards.yaml       compare two folders, image by image

  FOLDER [FOLDER]       images (.png, .jpg, .webp, .bmp, .gif, .tif, .avif), also in subfolders
  --reward NAME ...     rewards with their default arguments: HPSv2, PickScore, ImageReward, AestheticScore, ...
  --rewards FILE        the same from a YAML file that maps names to rewards: hps: {class_path: HPSv2, init_args: {...}}
  --prompts SOURCE      auto, sidecar (NAME.txt), metadata, names, a table with the columns file and prompt, or none
  --output FOLDER       tables, contact sheets and comparison; by default scores; an interrupted scoring continues
  --batch_size N        images per call of a reward; by default 8
  --device NAME         cpu or cuda; by default cuda if there is a GPU
  --unreadable WHAT     files that are no images: stop (the default), or skip them with a warning
  --parquet             write scores.parquet beside scores.csv
  --pairwise            for two folders: also ask judges (VLMJudge, HumanVotes) which image of each pair is better"""

VOTE = """\
lightning-draft vote: compare images of the same prompt on a page in the browser, served to this machine only

  lightning-draft vote images                    pairs of images of the same prompt
  lightning-draft vote base fine_tuned           pairs with one image from each folder
  lightning-draft vote votes                     pairs that a training run with the reward HumanVotes(votes) asks for

  FOLDER [FOLDER]       images as for score, or the folder of HumanVotes
  --prompts SOURCE      auto, sidecar (NAME.txt), metadata, names, or a table with the columns file and prompt
  --votes FOLDER        folder of votes.csv, to which each vote is appended; by default the first FOLDER
  --port N              port on 127.0.0.1, by default 8765; 0 for any free one"""

LORA = """\
lightning-draft lora: inspect, convert, scale, mix, anneal and merge LoRA files

  lightning-draft lora info best.safetensors                 metadata, ranks, alphas, norms of the layers, check for NaN
  lightning-draft lora convert best.safetensors -o best.comfy.safetensors --format comfy
  lightning-draft lora scale best.safetensors 0.8 -o weaker.safetensors
  lightning-draft lora mix a.safetensors:0.7 b.safetensors:0.5 -o c.safetensors --rank 16
  lightning-draft lora anneal best.safetensors --schedule step_0.6 -o annealed.safetensors
  lightning-draft lora merge best.safetensors -o folder      write the whole pipeline with the LoRA in its weights

  --model NAME          the base model; by default the one in the header of the file
  --output FILE         the file to write, or the folder of merge
  --format FORMAT       diffusers, or comfy for ComfyUI, Forge and AUTOMATIC1111
  --rank N              rank of the new file, by singular value decomposition of each layer's update; the relative error
                        |dW - dW'| / |dW| is printed; the default of mix is the sum of the ranks, which is exact
  --dtype NAME          float32, float16 or bfloat16
  --scale S             for merge: scale of the LoRA; by default 1
  --schedule SCHEDULE, --interpolate WHAT
                        for anneal: scale as a function of the sampling step, as for sample; it is written to the header
  --all                 for info: every layer

Image grid of the base model, the given files and the result, from the same noise
  --prompt P [P ...]    write the grid with these prompts, or with --prompts FILE|NAME
  --reward NAME ...     rewards whose scores are printed and shown, or --rewards FILE
  --grid FILE           the image file; by default the name of the output with .png
  --seed, --max, --steps, --height, --width, --device
                        as for sample"""


PLAN = """\
lightning-draft plan: peak memory and cost of a training step, before the diffusion model's weights are loaded or
downloaded

  lightning-draft plan --config sd15_draft_k_clip
  lightning-draft plan --config sdxl_pickscore --memory 24GB

  --config NAME|FILE     as for fit, with all its options; of the model only configuration files are read or downloaded
  --memory SIZE          memory of a GPU, such as 12GB; the largest batch that fits is printed
  --flops NUMBER         FLOP/s that the GPU reaches, such as 60e12; the seconds of a step are printed
  --brief                do not try the options that may lower the peak"""

COMMANDS = {
    "fit": FIT,
    "validate": VALIDATE,
    "sample": SAMPLE,
    "guide": GUIDE,
    "score": SCORE,
    "vote": VOTE,
    "lora": LORA,
    "plan": PLAN,
}
INSTEAD = {
    "test": "score held-out prompts with `lightning-draft validate`",
    "predict": "generate images with `lightning-draft sample`",
    "train": "train with `lightning-draft fit`",
}
