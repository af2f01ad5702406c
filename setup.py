"""Complete the links of README.md and the project's addresses when a distribution is built.

A package index shows README.md without the files that it links to. The address of the repository is the environment
variable `LIGHTNING_DRAFT_REPOSITORY`, that of the sdist from which the wheel is built, or that of the git remote
`origin`; without one, links stay relative.
"""

import email
import os
import re
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PAPER = {"Paper": "https://arxiv.org/abs/2309.17400"}


def repository() -> str | None:
    """Return the address of the repository in the form https://HOST/OWNER/NAME."""
    if address := os.environ.get("LIGHTNING_DRAFT_REPOSITORY"):
        return address.rstrip("/")
    if (ROOT / "PKG-INFO").exists():
        urls = email.message_from_string((ROOT / "PKG-INFO").read_text(encoding="utf-8")).get_all("Project-URL", [])
        return dict(url.split(", ", 1) for url in urls).get("Source")
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        remote = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None
    found = re.fullmatch(r"(?:https://(?:[^@/]*@)?|git@|ssh://git@)([^/:]+)[/:](.+?)(?:\.git)?/?", remote)
    return f"https://{found[1]}/{found[2]}" if found else None


def with_absolute_links(text: str, address: str) -> str:
    """Return Markdown whose relative links and images are addresses of the repository's main branch."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({address}/{kind}/main/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", absolute, text)


def main() -> None:
    """Build with the completed description and addresses."""
    readme, address = (ROOT / "README.md").read_text(encoding="utf-8"), repository()
    urls = dict(PAPER)
    if address:
        readme = with_absolute_links(readme, address)
        pages = {"Source": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
        urls |= {name: address + page for name, page in pages.items()}
    setup(long_description=readme, long_description_content_type="text/markdown", project_urls=urls)


if __name__ == "__main__":
    main()
