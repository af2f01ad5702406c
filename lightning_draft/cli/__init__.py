"""The command line; `lightning_draft.__main__` imports what a verb needs, when it needs it."""
