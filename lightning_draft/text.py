"""Text for one line of a page, a table or an image."""


def one_line(text: str) -> str:
    """Return text in one line without control characters, such as the escape sequences of terminals."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
