"""Text for one line of a page, a table or an image."""


def one_line(text: str) -> str:
    """Return text in one line without control characters, such as the escape sequences of terminals."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if the message is empty."""
    line: str = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.partition(". If you want to instead overwrite")[0]  # advice of diffusers that does not apply here
