"""A results file: whole rows, none lost and none twice, whatever ends the process that writes it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixkv.experiments.sweep import journal as module
from mixkv.experiments.sweep.journal import Journal
from mixkv.models.errors import UsageError


def row(key: str, **more: Any) -> dict[str, Any]:
    return {"kind": "eval", "key": key, **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def refused(path: Path, *words: str) -> None:
    """A file is refused in one line that names it, and not one byte of it has changed."""
    before = path.read_bytes() if os.path.isfile(path) else None
    with pytest.raises(UsageError) as caught, Journal(path):
        pass
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600, message
    assert all(word in message for word in words), message
    assert before is None or path.read_bytes() == before
    if before is not None:
        path.write_bytes(b"")
        with Journal(path):  # the lock has been given back
            pass


def test_rows_are_on_the_disk_when_append_returns(path: Path) -> None:
    with Journal(path) as journal:
        assert (journal.keys, journal.torn, path.read_bytes()) == (set(), 0, b"")
        journal.append(row("a", x=1.5, text="déjà\n\u2028\udc80"))
        assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().endswith(b"}\n")
        journal.append(row("b"))
        assert journal.keys == {"a", "b"}
        assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["a", "b"]
    with Journal(path) as journal:
        assert journal.keys == {"a", "b"} and journal.rows({"a"}) == [row("a", x=1.5, text="déjà\n\u2028\udc80")]


def test_other_rows_may_stand_there_too(path: Path) -> None:
    """Rows of a benchmark have no key, and rows of other programs may have kinds that nobody here knows."""
    text = b'{"test": "tg128", "avg_ts": 3.5}\n{"kind": "needle", "key": "n1"}\n{"key": 5}\n'
    path.write_bytes(text)
    with Journal(path) as journal:
        assert journal.keys == {"n1"} and path.read_bytes() == text
        journal.append(row("a"))
        assert [x["key"] for x in journal.rows({"a", "n1", "b"})] == ["n1", "a"]
    assert path.read_bytes() == text + b'{"kind": "eval", "key": "a"}\n'


def test_a_row_that_is_there_twice_counts_once(path: Path) -> None:
    """As in two results files that somebody has put together."""
    path.write_bytes(b'{"kind": "eval", "key": "a", "x": 1}\n' * 2)
    with Journal(path) as journal:
        assert journal.rows({"a"}) == [row("a", x=1)]


lines = st.builds(lambda n, text: {"x": n, "text": text}, st.integers(), st.text(max_size=20))


class Killed(RuleBasedStateMachine):
    """A journal whose process may be killed at any byte: what the file must hold is known line by line."""

    @initialize()
    def begin(self) -> None:
        folder = Path(os.environ["JOURNAL_FOLDER"])
        self.path = folder / f"{len(list(folder.iterdir()))}.jsonl"
        self.lines: list[bytes] = []
        self.n, self.journal = 0, None

    @precondition(lambda self: self.journal is None)
    @rule()
    def open(self) -> None:
        before = self.path.read_bytes() if self.path.exists() else b""
        journal = Journal(self.path).__enter__()
        whole = b"".join(self.lines)
        assert self.path.read_bytes() == whole
        assert journal.torn == (0 if whole.startswith(before) else len(before) - len(whole))
        assert journal.keys == {json.loads(line)["key"] for line in self.lines}
        self.journal = journal

    @precondition(lambda self: self.journal is not None)
    @rule(more=lines)
    def append(self, more: dict[str, Any]) -> None:
        self.journal.append(row(f"{self.n}", **more))
        self.lines.append((json.dumps(row(f"{self.n}", **more), ensure_ascii=False) + "\n").encode())
        self.n += 1

    @precondition(lambda self: self.journal is not None)
    @rule()
    def close(self) -> None:
        self.journal.__exit__()
        self.journal = None

    @precondition(lambda self: self.journal is not None)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        """While a row was being written: some of its bytes are there; or, at worst, some bytes of earlier ones are not."""
        self.close()
        size = self.path.stat().st_size
        at = data.draw(st.integers(0, size) | st.sampled_from([0, size, max(size - 1, 0), max(size - 2, 0)]))
        os.truncate(self.path, at)
        kept: list[bytes] = []
        for line in self.lines:
            if sum(map(len, kept)) + len(line) > at + 1:  # without its newline it is whole all the same
                break
            kept.append(line)
        self.lines = kept

    @precondition(lambda self: self.journal is not None)
    @rule(n=st.integers(1, 40), error=st.sampled_from([errno.ENOSPC, errno.EIO]), more=lines)
    def fail(self, n: int, error: int, more: dict[str, Any]) -> None:
        """The disk is full after so many bytes."""
        write, left = os.write, [n]

        def some(file: int, data: bytes) -> int:
            if not left[0]:
                raise OSError(error, os.strerror(error))
            done = write(file, data[: left[0]])
            left[0] -= done
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.os, "write", some)
            with pytest.raises(UsageError, match="cannot be written"):
                self.journal.append(row("never", **more, pad="x" * 40))
        assert "never" not in self.journal.keys

    @invariant()
    def is_whole(self) -> None:
        if getattr(self, "journal", None) is not None:
            assert self.path.read_bytes() == b"".join(self.lines)

    def teardown(self) -> None:
        if getattr(self, "journal", None) is not None:
            self.close()


@pytest.mark.fault("sweep-killed")
def test_whatever_a_kill_leaves_whole_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_FOLDER", str(tmp_path))
    monkeypatch.setattr(module.os, "fsync", lambda _: None)  # thousands of them take a while
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Killed, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


@pytest.mark.parametrize("at", range(1, 13))
def test_a_row_of_a_few_bytes_is_cut_off_too(path: Path, at: int) -> None:
    whole = b'{"kind": "eval", "key": "a"}\n'
    path.write_bytes(whole + whole[:at])
    with Journal(path) as journal:
        assert (journal.torn, journal.keys, path.read_bytes()) == (at, {"a"}, whole)


FOREIGN = {
    "a text": b"Dear diary,\ntoday I ran a sweep.\n",
    "no newline": b"hello",
    "a table": b"a,b\n1,2",
    "pretty json": b'{\n  "kind": "eval"\n}\n',
    "a list": b"[1, 2, 3]\n",
    "a number": b"5",
    "an object that is not ours": b'{"hidden_size": 64, "kind": "llama"}',
    "half an object that is not ours": b'{"hidden_size": 64, "ki',
    "rows, then a text": b'{"kind": "eval", "key": "a"}\nand so on',
    "rows, then a text and a row": b'{"kind": "eval", "key": "a"}\nand\n{"kind": "eval"',
    "a row that broke off in the middle": b'{"kind": "eval", "ke\n{"kind": "eval", "key": "a"}\n',
    "an empty line": b'{"kind": "eval", "key": "a"}\n\n',
    "not utf-8": b'{"kind": "eval", "key": "\xff"}\n',
    "nothing but zeros": b"\0" * 50,
    "a binary": bytes(range(256)),
    "brackets": b"[" * 200_000 + b"\n",
    "brackets in an object": b'{"kind": ' + b"[" * 200_000 + b"\n",
    "a number of many digits": b'{"kind": "eval", "x": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(path: Path, name: str) -> None:
    path.write_bytes(FOREIGN[name])
    refused(path, "is this a results file?")


def test_a_row_that_breaks_off_in_brackets_is_cut_off(path: Path) -> None:
    path.write_bytes(b'{"kind": "eval", "x": ' + b"[" * 200_000)
    with Journal(path) as journal:
        assert journal.torn == 200_022 and path.read_bytes() == b""


def test_a_row_longer_than_a_reader_takes_is_neither_read_nor_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_RESULT_LINE_BYTES", 100)
    filled = len(json.dumps(row("a", text="")))
    longest = row("a", text="x" * (100 - filled))
    with Journal(path) as journal:
        journal.append(longest)
        whole = path.read_bytes()
        assert len(whole) == 101
        with pytest.raises(UsageError, match="a row of 101 bytes, more than the 100"):
            journal.append(row("b", text="x" * (101 - filled)))
        assert path.read_bytes() == whole and journal.keys == {"a"}
    for end in (b"", b"\n"):
        path.write_bytes(whole[:-1] + end)
        with Journal(path) as journal:
            assert journal.keys == {"a"}
        path.write_bytes(whole[:-3] + b'x"}' + end)
        refused(path, ":1: a line of more than 100 bytes")
        path.write_bytes(whole + b" " + whole[:-1] + end)
        refused(path, ":2: a line of more than 100 bytes")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "not a file")
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    refused(fifo, "not a file")
    refused(Path("/dev/null"), "not a file")
    assert not Path("/dev/null.lock").exists() and sorted(tmp_path.iterdir()) == [fifo]
    refused(tmp_path / "none" / "results.jsonl", "there is no folder")
    assert not (tmp_path / "none").exists()
    (tmp_path / "plain").write_text("x")
    refused(tmp_path / "plain" / "results.jsonl", "there is no folder")
    refused(tmp_path / ("x" * 300), "File name too long")


@pytest.mark.fault("disk-full")
@pytest.mark.parametrize("function", ["open", "write"])
def test_a_file_that_cannot_be_written_is_refused(path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b'{"kind": "eval", "key": "a"}'
    path.write_bytes(text)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    real = os.open
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="cannot be written: Permission denied"):
        if function == "write":
            patch.setattr(module.os, "write", refuse)
        else:
            patch.setattr(module.os, "open", lambda at, *x: refuse() if Path(at) == path else real(at, *x))
        with Journal(path):
            pass
    assert path.read_bytes() == text
    with Journal(path) as journal:
        assert journal.keys == {"a"} and path.read_bytes() == text + b"\n"


def test_one_process_at_a_time_writes(path: Path) -> None:
    source = (
        "import sys\nfrom pathlib import Path\nfrom mixkv.experiments.sweep.journal import Journal\n"
        "with Journal(Path(sys.argv[1])):\n    print('in')"
    )

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, timeout=60)

    with Journal(path) as journal:
        journal.append(row("a"))
        before = path.read_bytes()
        with pytest.raises(UsageError, match="another process is writing to it"), Journal(path):
            pass
        found = other()
        assert found.returncode == 1 and "another process is writing to it" in found.stderr
        assert path.read_bytes() == before
        journal.append(row("b"))
    assert other().stdout == "in\n"
