"""What a refusal of the command line must look like."""

from typer.testing import Result


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr that holds all the words, nothing on stdout, and the documented exit code."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("mixkv: "), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
