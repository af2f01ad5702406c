"""The page on which people vote on pairs of images."""

from html import escape

from lightning_draft.votes import Pair

STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 16px; color: #222;
  background: #fafafa }
h1 { font-size: 20px; font-weight: 600; margin: 0 0 12px }
form { display: grid; grid-template-columns: 1fr 1fr; gap: 12px }
button { font: inherit; padding: 8px; border: 1px solid #bbb; border-radius: 6px; background: #fff; cursor: pointer }
button:hover, button:focus { border-color: #0a58ca; outline: 2px solid #0a58ca }
button.tie { grid-column: 1 / 3 }
img { display: block; width: 100%; max-height: 75vh; object-fit: contain; image-rendering: auto; margin-bottom: 8px }
footer { margin-top: 12px; color: #666; display: flex; justify-content: space-between }
"""

SCRIPT = """
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie"};
document.addEventListener("keydown", event => {
  const button = document.getElementById(keys[event.key]);
  if (button && !event.repeat) { event.preventDefault(); button.click(); }
});
"""


def vote_page(pair: Pair, token: str, nonce: str, done: int, total: int, previous: Pair | None) -> str:
    """Return the page for one pair.

    The images are shown in an order that depends on their keys, so that no folder is always on the same side.

    Args:
        pair: The pair.
        token: The form's token, without which a vote is rejected.
        nonce: The nonce of the script and the style.
        done: Number of pairs with a vote.
        total: Number of pairs.
        previous: The pair of the last vote, which can be changed.
    """
    sides = [("first", pair.first), ("second", pair.second)]
    if pair.first > pair.second:
        sides.reverse()
    buttons = "".join(
        f'<button name="winner" value="{winner}" id="{side}"><img src="/image/{escape(key)}" alt="image on the {side}">'
        f"{arrow}</button>"
        for (winner, key), side, arrow in zip(sides, ("left", "right"), ("&larr; left", "right &rarr;"), strict=True)
    )
    hidden = "".join(
        f'<input type="hidden" name="{name}" value="{escape(value)}">'
        for name, value in (("pair", pair.key), ("token", token))
    )
    back = "" if previous is None else f'<a href="/?pair={previous.key}">change the last vote</a>'
    body = (
        f"<h1>{escape(pair.prompt)}</h1>"
        f'<form method="post" action="/vote">{hidden}{buttons}'
        '<button name="winner" value="tie" id="tie" class="tie">&darr; equally good</button></form>'
        f"<footer><span>{done} of {total} pairs have a vote</span>{back}</footer>"
        f'<script nonce="{nonce}">{SCRIPT}</script>'
    )
    return _page(body, nonce)


def finished_page(nonce: str, total: int, waits: bool) -> str:
    """Return the page that is shown when all pairs have a vote.

    Args:
        nonce: The nonce of the style.
        total: Number of pairs.
        waits: Whether more pairs may come, so that the page is loaded again every two seconds.
    """
    text = "Waiting for images of the training run." if waits else "You can close this page and stop the command."
    refresh = '<meta http-equiv="refresh" content="2">' if waits else ""
    return _page(f"<h1>All {total} pairs have a vote.</h1><p>{text}</p>", nonce, refresh)


def _page(body: str, nonce: str, head: str = "") -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Vote</title>{head}'
        f'<meta name="viewport" content="width=device-width"><style nonce="{nonce}">{STYLE}</style></head>'
        f"<body>{body}</body></html>"
    )
