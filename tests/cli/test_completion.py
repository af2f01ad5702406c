"""Tab completion: bash completes commands, configs and options with the script."""

import shutil
import subprocess
from collections.abc import Callable

import pytest

from lightning_draft.cli import shipped
from lightning_draft.cli.completion import script


def complete(*words: str) -> list[str]:
    """Return bash's completions for the last of `words`."""
    line = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _lightning_draft"
    program = f'{script("bash")}\n{line}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lightning-draft", "va"], ["validate"]),
        (["lightning-draft", "fit", "--config", "quick"], ["quickstart"]),
        (["lightning-draft", "fit", "--config", ""], shipped.names()),
        (["lightning-draft", "configs", "show", "guard"], ["guard"]),
        (["lightning-draft", "fit", "--trainer.max"], ["--trainer.max_steps"]),
        (["lightning-draft", "fit", "--model.truncation.k"], ["--model.truncation.k"]),
        (["lightning-draft", "fit", "--model.model.lora.rank"], ["--model.model.lora.rank"]),
        (["lightning-draft", "sample", "--sca"], ["--scale"]),
        (["lightning-draft", "score", "runs"], []),
    ],
)
def test_bash_completes_commands_configs_and_options(words: list[str], expected: list[str]) -> None:
    assert complete(*words) == expected


def test_command_prints_the_script(command: Callable) -> None:
    assert command("completion", "bash").out == script("bash")
    assert script("zsh").endswith(script("bash"))
    assert command("completion").status == 2
    assert "completion='fish'" in command("completion", "fish").err
    assert "init_args" not in script("bash")
    assert "class_path" not in script("bash")
