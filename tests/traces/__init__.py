"""Recorded traces of training, to check that a refactoring does not change results.

    python -m tests.traces compare tests/traces/reference.json
    python -m tests.traces record FILE [--only PREFIX ...]

`record` trains about 90 small cases for a few steps, on the CPU in float32 with one thread, and writes the loss, the
reward, the gradient norm and the SHA-256 of the parameters after every batch. `compare` repeats the cases of a file and
reports for each whether it is identical, equal to rounding or different; it exits with 1 if a case is different.

`cases.py` is the only file that uses names of the package, so that a refactoring edits only this file; case names and
`reference.json` do not change. A number that is meant to change is recorded again with `record FILE --only PREFIX`,
which replaces these cases in the file; the commit message gives the reason.
"""
