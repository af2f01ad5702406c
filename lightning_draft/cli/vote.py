"""The command `vote`: a page on which people compare images."""

import argparse
from collections.abc import Sequence
from contextlib import suppress

from lightning_draft.arguments import in_range
from lightning_draft.cli.command_parser import CommandParser
from lightning_draft.errors import ConfigurationError
from lightning_draft.vote_pairs import pairs_of_folders
from lightning_draft.vote_server import VoteServer
from lightning_draft.votes import VoteFolder


def main(args: Sequence[str]) -> int:
    """Serve the page until Ctrl-C; return the exit status.

    Raises:
        ConfigurationError: The arguments are not valid.
    """
    options = parser().parse_args(args)
    with build_server(options) as server:
        print(f"vote on {server.url} (Ctrl-C to stop); votes are written to {server.folder.votes_file}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        votes = server.folder.votes()
        print(f"\n{sum(pair.id in votes for pair in server.pairs())} of {len(server.pairs())} pairs have a vote")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parsed = CommandParser("lightning-draft vote")
    parsed.add_argument("folders", nargs="+", metavar="FOLDER")
    parsed.add_argument("--prompts", default="auto")
    parsed.add_argument("--votes", metavar="FOLDER")
    parsed.add_argument("--port", type=int, default=8765)
    return parsed


def build_server(options: argparse.Namespace) -> VoteServer:
    """Build the server for folders of images, or for a folder in which a training run asks for votes.

    Raises:
        ConfigurationError: There are no pairs, or the port is in use.
    """
    in_range("--port", options.port, 0, 65535, "write a port such as 8765, or 0 for any free one")
    folder = VoteFolder(options.votes or options.folders[0])
    try:
        if len(options.folders) == 1 and folder.pairs_file.exists():
            return VoteServer(folder, port=options.port)
        pairs, files = pairs_of_folders(options.folders, options.prompts)
        return VoteServer(folder, pairs, files, options.port)
    except OSError as error:
        raise ConfigurationError(f"--port {options.port} cannot be used: {error.strerror}; write --port 0") from error
