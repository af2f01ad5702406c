"""Invalid input and the message that it must give, as one table; `docs/errors.md` is written from it."""
