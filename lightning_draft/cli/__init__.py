"""The command line; `lightning_draft.__main__` imports the modules of a command only when it runs."""
