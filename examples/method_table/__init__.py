"""Every method on the same model, rewards, prompts and seeds: `python -m examples.method_table`."""
