"""Sessions from the shell: what one run has read, the next one does not read again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from mixkv import Session, cli, load
from mixkv.commands import shell
from mixkv.engine import conversation
from mixkv.engine.session import CHUNK
from mixkv.models import toy
from mixkv.models.bpe import BYTE_OF_CHARACTER
from mixkv.models.errors import SessionFileError
from mixkv.models.load import Model
from mixkv.models.names import expected_tensors

CHATML = (Path(__file__).parent / "data" / "chat_templates" / "chatml.jinja").read_text()
CONTROL = ["<|im_start|>", "<|im_end|>"]
BYTES = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
RUNNER = CliRunner()


def mixkv(*arguments: str, text: str | None = None) -> Result:
    return RUNNER.invoke(cli.app, list(arguments), input=text)


def run(*arguments: str) -> dict[str, Any]:
    result = mixkv("generate", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.stdout == "" and len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's weights with a byte-level tokenizer and the ChatML template; it answers in printable ASCII."""
    folder = tmp_path_factory.mktemp("chatty")
    vocab = {token: i for i, token in enumerate([*BYTES, *CONTROL])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    backend.save(str(folder / "tokenizer.json"))
    described = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    config = toy.CONFIG
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    keys = {name: getattr(config, name) for name in names}
    keys |= {
        "rope_theta": config.rope.theta,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    source = toy.ToySource(expected_tensors(config))
    tensors = {name: np.ascontiguousarray(source.read(name)) for name in source.shapes}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def chat_model(chatty: Path) -> Model:
    """In 8 bits: then what is computed does not depend on how a prompt is cut."""
    return load(str(chatty), "q8")


def messages(file: Path) -> list[dict[str, str]]:
    return json.loads(conversation.read_saved(file).added["messages"])


# --- raw text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["balanced", "k8v2:window=9:sinks=1:tile=32", "f32"])
def test_a_text_goes_on_as_if_it_had_been_one_run(tmp_path: Path, toy: Model, policy: str) -> None:
    file, options = tmp_path / "s", ("-m", "toy", "--policy", policy, "-n", "20")
    prompts = ["Once upon a time", " and then", ""]
    read, text = 0, list[int]()
    for turn, prompt in enumerate(prompts):
        found = run(prompt, "--session", str(file), *options)
        text += [*prompt.encode()]
        assert found["stats"]["kept_tokens"] == read and found["stats"]["prompt_tokens"] == len(text) - read, turn
        assert found["prompt_ids"] == text[read:], "behind what was read: the last token generated, and the prompt"
        # What one session gives that reads the same text; packed weights or not, the toy's text is the same
        whole = Session(toy, conversation.read_saved(file).policy)
        fed, expected = text, []
        for _ in range(20):
            fed = [int(whole.forward(fed, "last").argmax())]
            expected += fed
        assert found["token_ids"] == expected
        text += expected
        read = len(text) - 1
    assert conversation.read_saved(file).token_ids.tolist() == text[:-1]
    assert not list(tmp_path.glob(".mixkv*"))


def test_the_line_on_stderr_says_what_was_kept(tmp_path: Path) -> None:
    arguments = ("generate", "hello", "-m", "toy", "-n", "5", "--session", str(tmp_path / "s"))
    first, second = mixkv(*arguments), mixkv(*arguments)
    assert "kept 0 tokens | prompt 5 tokens" in first.stderr and f"saved to {tmp_path / 's'}" in first.stderr
    assert "kept 9 tokens | prompt 6 tokens" in second.stderr
    assert mixkv(*arguments, "-q").stderr == ""
    assert "kept" not in mixkv(*arguments[:-2]).stderr


def test_the_prompt_may_come_from_stdin_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s"
    (tmp_path / "prompt").write_text("more")
    run("hello", "-m", "toy", "-n", "1", "--session", str(file))
    for arguments, text in ((["--file", str(tmp_path / "prompt")], None), ([], "more"), (["-"], "more")):
        result = mixkv("generate", *arguments, "-m", "toy", "-n", "1", "--json", "--session", str(file), text=text)
        assert json.loads(result.stdout)["prompt_ids"][1:] == list(b"more")


def test_an_end_of_text_or_a_full_context_can_be_gone_on_from(tmp_path: Path, chatty: Path) -> None:
    file = tmp_path / "s"
    first = run("hello", "-m", "toy", "--context", "9", "--session", str(file))
    assert first["finish_reason"] == "context"
    refused(mixkv("generate", "more", "-m", "toy", "--session", str(file)), 5, "do not fit", "of the context's 9")
    second = run("more", "-m", "toy", "--context", "60", "-n", "3", "--session", str(file))
    assert second["stats"]["kept_tokens"] == 9
    assert conversation.summary(file)["context"] == 60


def test_a_beginning_of_text_is_read_once(tmp_path: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.encode
    monkeypatch.setattr(Model, "encode", lambda model, text: [256, *original(model, text)])
    file = tmp_path / "s"
    assert run("ab", "-m", "toy", "-n", "2", "--session", str(file))["prompt_ids"] == [256, 97, 98]
    assert run("cd", "-m", "toy", "-n", "2", "--session", str(file))["prompt_ids"][1:] == [99, 100]


def test_the_repeat_penalty_sees_the_whole_session(tmp_path: Path) -> None:
    file, options = tmp_path / "s", ("-m", "toy", "-n", "12", "--repeat-penalty", "100")
    first = run("hello", *options, "--session", str(file))
    second = run("", *options, "--session", str(file))
    seen = first["token_ids"]
    assert len(set(seen)) == 12 and len({*seen, *second["token_ids"]}) == 24


# --- chat ---------------------------------------------------------------------------------------------------------


def test_two_turns_of_a_chat_are_those_of_the_whole_conversation(
    tmp_path: Path, chatty: Path, chat_model: Model
) -> None:
    file, options = tmp_path / "s", ("-m", str(chatty), "--weights", "q8", "-n", "15")
    first = run("Who are you?", "--system", "Be brief.", *options, "--session", str(file))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    assert first["prompt_ids"] == chat_model.encode_chat(said) and first["stats"]["kept_tokens"] == 0
    said += [{"role": "assistant", "content": first["text"]}]
    assert messages(file) == said
    second = run("And who am I?", *options, "--session", str(file))
    said += [{"role": "user", "content": "And who am I?"}]
    whole = chat_model.encode_chat(said)
    kept = len(first["prompt_ids"]) + 14
    assert second["stats"]["kept_tokens"] == kept and second["prompt_ids"] == whole[kept:]
    session, expected, fed = Session(chat_model), [], whole
    for _ in range(15):
        fed = [int(session.forward(fed, "last").argmax())]
        expected += fed
    assert second["token_ids"] == expected
    assert messages(file) == [*said, {"role": "assistant", "content": second["text"]}]
    assert conversation.read_saved(file).token_ids.tolist() == [*whole, *expected[:-1]]


@pytest.mark.parametrize("rollback", ["0", "200"])
def test_where_the_template_writes_an_answer_otherwise_reading_goes_on_where_they_part(
    tmp_path: Path, chatty: Path, chat_model: Model, rollback: str
) -> None:
    file = tmp_path / "s"
    options = ("-m", str(chatty), "--weights", "q8", "-n", "100", "--session", str(file), "--rollback", rollback)
    options += ("--window", "10", "--tile", "32")
    first = run("Hi", *options)
    session = Session.load(chat_model, file)
    said = messages(file)
    said[1]["content"] = said[1]["content"][:20] + "~" + said[1]["content"][21:]
    session.save(file, {**session.metadata, "messages": json.dumps(said)})
    second = run("Go on", *options)
    kept = len(first["prompt_ids"]) + 20
    whole = chat_model.encode_chat([*said, {"role": "user", "content": "Go on"}])
    assert second["stats"]["kept_tokens"] == (kept if rollback == "200" else 0)
    assert second["prompt_ids"] == whole[second["stats"]["kept_tokens"] :]
    fresh, expected, fed = Session(chat_model, session.policy), [], whole
    for _ in range(100):
        fed = [int(fresh.forward(fed, "last").argmax())]
        expected += fed
    assert second["token_ids"] == expected


def test_a_system_message_is_for_a_new_conversation(tmp_path: Path, chatty: Path) -> None:
    file = tmp_path / "s"
    run("Hi", "-m", str(chatty), "-n", "3", "--session", str(file))
    before = file.read_bytes()
    for mode in ([], ["--chat"]):
        result = mixkv("generate", "Hi", "-m", str(chatty), "--system", "x", "--session", str(file), *mode)
        refused(result, 2, "--system", "new conversation", str(file))
    assert file.read_bytes() == before


def test_chat_and_raw_must_agree_with_the_file(tmp_path: Path, chatty: Path) -> None:
    raw, chat = tmp_path / "raw", tmp_path / "chat"
    options = ("-m", str(chatty), "-n", "3", "--session")
    run("Hi", "--raw", *options, str(raw))
    run("Hi", *options, str(chat))
    refused(mixkv("generate", "x", "--chat", *options, str(raw)), 2, "mode raw", "--chat")
    refused(mixkv("generate", "x", "--raw", *options, str(chat)), 2, "mode chat", "--raw")
    assert run("x", *options, str(raw))["prompt_ids"][1:] == [*map("".join(BYTES).index, "x")]
    assert len(messages(chat)) == 2 and run("x", *options, str(chat)) and len(messages(chat)) == 4


def test_a_file_saved_from_python_is_a_raw_text(tmp_path: Path, toy: Model) -> None:
    session = Session(toy)
    session.forward([1, 2, 3], None)
    session.save(tmp_path / "s", {"note": "mine"})
    assert run("x", "-m", "toy", "-n", "2", "--session", str(tmp_path / "s"))["prompt_ids"] == [120]
    assert conversation.read_saved(tmp_path / "s").added["note"] == "mine"


@pytest.mark.parametrize("n", [5, 200, 256])
def test_where_everything_is_read_the_last_token_is_read_again(tmp_path: Path, toy: Model, n: int) -> None:
    ids, session, whole = np.arange(n) % 90 + 33, Session(toy), Session(toy)
    session.forward(ids, None)
    session.save(tmp_path / "s")
    found = run("", "-m", "toy", "-n", "1", "--session", str(tmp_path / "s"))
    kept = n - 1 if n - 1 >= session.cache.lowest else 0
    assert found["stats"]["kept_tokens"] == kept and found["prompt_ids"] == ids[kept:].tolist()
    assert found["token_ids"] == [int(whole.forward(ids, "last").argmax())]


# --- policies and models ------------------------------------------------------------------------------------------


def test_another_policy_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    file, options = tmp_path / "s", ("-m", "toy", "-n", "3", "--session", str(tmp_path / "s"))
    run("x" * 400, *options, "--window", "20", "--k-bits", "8")
    before = file.read_bytes()
    result = mixkv("generate", "y", *options, "--k-bits", "2")
    refused(result, 2, "recent=20:f16 tile=64 old=k8c/v4t", "recent=20:f16 tile=64 old=k2c/v4t", "--retier")
    refused(mixkv("generate", "y", *options, "--policy", "f16"), 2, "old=k16/v16", "--retier")
    assert file.read_bytes() == before
    same = run("y", *options, "--window", "20", "--k-bits", "8")
    assert same["stats"]["kept_tokens"] == 402 and "retier" not in same["stats"]
    result = mixkv("generate", "y", *options, "--k-bits", "2", "--retier", "--json")
    stats = json.loads(result.stdout)["stats"]
    assert "old=k2c/v4t" in stats["policy"] and stats["kept_tokens"] == 406
    assert stats["retier"] == {"tokens": 406, "requantized": 380, "not_restored": 0}
    assert (
        "406 tokens are kept by the policy" in result.stderr and "380 of them were rounded once more" in result.stderr
    )
    assert "old=k2c/v4t" in conversation.summary(file)["policy"]
    assert run("z", *options)["stats"]["policy"] == stats["policy"], "without options, that of the file"


def test_retier_without_anything_to_change_is_refused(tmp_path: Path) -> None:
    for options in (["--retier"], ["--retier", "--k-bits", "2"], ["--retier", "--session", str(tmp_path / "s")]):
        refused(mixkv("generate", "x", "-m", "toy", *options), 2, "--retier has no effect")


@pytest.mark.fault("session-file")
def test_another_model_or_weights_and_a_damaged_file_are_refused(tmp_path: Path, chatty: Path) -> None:
    file = tmp_path / "s"
    run("x", "-m", "toy", "-n", "3", "--session", str(file))
    before = file.read_bytes()
    for options in (["-m", "toy", "--weights", "q8"], ["-m", str(chatty), "--weights", "bf16"]):
        refused(mixkv("generate", "x", *options, "--session", str(file)), 7, "another model", str(file))
    assert file.read_bytes() == before
    file.write_bytes(before[:-1] + b"\xff")
    refused(mixkv("generate", "x", "-m", "toy", "--session", str(file)), 7, "damaged")
    refused(mixkv("info", "--session", str(file)), 7, "damaged")
    refused(mixkv("generate", "x", "-m", "toy", "--session", str(tmp_path)), 7, str(tmp_path))
    refused(mixkv("generate", "x", "-m", "toy", "--session", str(tmp_path / "no" / "s")), 7, "No such file")


@pytest.mark.parametrize(
    "changed",
    [{"mode": "sung"}, {"mode": "chat"}, {"mode": "chat", "messages": "["}, {"mode": "chat", "messages": "{}"},
     {"mode": "chat", "messages": '[{"role": 5, "content": ""}]'}, {"mode": "chat", "messages": '[{"role": "user"}]'},
     {"mode": "chat", "messages": "[" * 100_000}, {"text": "5"}, {"text": '{"read": 99, "rest": []}'},
     {"text": '{"read": 1.0, "rest": []}'}, {"text": '{"read": -1, "rest": []}'}, {"text": '{"read": 1, "rest": [-1]}'},
     {"text": '{"read": 1, "rest": [258]}'}, {"text": '{"read": 1, "rest": 5}'}, {"text": '{"read": 1}'}],
    ids=lambda changed: str(changed)[:60],
)  # fmt: skip
def test_words_in_a_file_that_cannot_be_are_refused(tmp_path: Path, toy: Model, changed: dict[str, str]) -> None:
    session = Session(toy)
    session.forward([1, 2, 3], None)
    session.save(tmp_path / "s", {"mode": "raw", **changed})
    refused(mixkv("generate", "x", "-m", "toy", "-q", "--session", str(tmp_path / "s")), 7, "cannot be used")


# --- errors and interrupts ----------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mixkv.cli", "generate", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0,  # what a buffer had read already, ``communicate`` would not see
    )  # fmt: skip


def first_bytes(process: subprocess.Popen[bytes], n: int) -> bytes:
    """At least so many bytes of what a process writes to stdout, and all that it has written by then."""
    shown = b""
    assert process.stdout is not None
    while len(shown) < n:
        more = process.stdout.read(n)
        assert more, "stdout was closed"
        shown += more
    return shown


@pytest.mark.fault("interrupt")
def test_ctrl_c_keeps_what_was_generated(tmp_path: Path, chatty: Path) -> None:
    file = tmp_path / "s"
    process = start("Hi", "-m", str(chatty), "-n", "15000", "--session", str(file))
    assert process.stdout is not None
    shown = first_bytes(process, 20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == shell.INTERRUPTED and b"saved to" in err, err
    answer = messages(file)[1]["content"]
    assert (shown + rest).decode() == answer + "\n" and len(answer) >= 20
    second = run("more", "-m", str(chatty), "-n", "3", "--session", str(file))
    assert second["stats"]["kept_tokens"] >= len(answer), "of the answer all but the last token were read"


@pytest.mark.fault("interrupt")
def test_ctrl_c_while_a_prompt_is_read_spares_the_next_run_what_was_read(
    tmp_path: Path, toy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, original, count = tmp_path / "s", Session._step, 0
    run("hello", "-m", "toy", "-n", "3", "--session", str(file))
    prompt = "y" * 2000
    expected = Session.load(toy, file)

    def step(session: Session, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(session, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_step", step)
        result = mixkv("generate", prompt, "-m", "toy", "-n", "3", "--session", str(file))
    assert result.exit_code == shell.INTERRUPTED and "saved to" in result.stderr
    assert conversation.read_saved(file).position == 7 + 2 * CHUNK
    again = run(prompt, "-m", "toy", "-n", "3", "--session", str(file))
    assert again["stats"]["kept_tokens"] == 7 + 2 * CHUNK and again["stats"]["prompt_tokens"] == 2001 - 2 * CHUNK
    text = conversation.read_saved(file).token_ids
    assert text[8:2008].tobytes() == np.full(2000, 121, np.int64).tobytes(), "the prompt is there once"
    assert int(expected.forward(text[7:2008], "last").argmax()) == again["token_ids"][0]


def test_an_error_before_anything_is_new_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, options = tmp_path / "s", ("-m", "toy", "-n", "3", "--session", str(tmp_path / "s"))
    refused(mixkv("generate", "", *options), 5, "empty")
    assert not file.exists()
    run("hello", *options)
    before = file.stat().st_mtime_ns, file.read_bytes()
    for arguments in (["x" * 20_000], ["x", "--temperature", "-1"], ["x", "--stop", ""], ["x", "--threads", "0"]):
        assert mixkv("generate", *arguments, *options).exit_code in (2, 5)
    monkeypatch.setattr(Session, "_step", lambda *_: 1 / 0)
    assert isinstance(mixkv("generate", "x", *options).exception, ZeroDivisionError)
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before


def test_an_error_behind_something_new_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixkv.models.errors import NumericalError

    original, count = Session._step, 0

    def step(session: Session, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise NumericalError("layer 0 gives NaN")
        return original(session, *args)

    monkeypatch.setattr(Session, "_step", step)
    result = mixkv("generate", "hello", "-m", "toy", "-n", "30", "-q", "--session", str(tmp_path / "s"))
    assert result.exit_code == 6 and len(result.stdout) == 4, "four tokens"
    monkeypatch.undo()
    assert conversation.read_saved(tmp_path / "s").position == 5 + 3
    assert run("", "-m", "toy", "-n", "3", "--session", str(tmp_path / "s"))["prompt_ids"] == [ord(result.stdout[3])]


@pytest.mark.fault("disk-full")
def test_a_full_disk_says_so_behind_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s"
    run("hello", "-m", "toy", "-n", "3", "--session", str(file))
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    result = mixkv("generate", "more", "-m", "toy", "-n", "3", "-q", "--json", "--session", str(file))
    assert result.exit_code == 7 and len(json.loads(result.stdout)["token_ids"]) == 3
    assert str(file) in result.stderr and "No space left on device" in result.stderr
    assert file.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["s"]


@pytest.mark.fault("closed-stdout")
def test_a_closed_stdout_saves_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "s"
    process = start("hello", "-m", "toy", "-n", "2000", "-q", "--session", str(file))
    assert process.stdout is not None and process.stderr is not None
    first_bytes(process, 3)
    process.stdout.close()
    assert process.wait(timeout=60) == shell.PIPE_CLOSED
    process.stderr.close()
    assert conversation.read_saved(file).position >= 5 + 3


# --- info ---------------------------------------------------------------------------------------------------------


def test_info_says_what_is_in_a_file_without_a_model(tmp_path: Path, chatty: Path) -> None:
    file = tmp_path / "s"
    run("Hi", "-m", str(chatty), "-n", "5", "--context", "99", "--k-bits", "3", "--session", str(file))
    started = time.perf_counter()
    found = json.loads(mixkv("info", "--session", str(file), "--json").stdout)
    assert time.perf_counter() - started < 2
    assert found["mode"] == "chat" and found["messages"] == 2 and found["context"] == 99
    assert found["tokens"] == conversation.read_saved(file).position and "old=k3c/v4t" in found["policy"]
    assert found["bytes"] == file.stat().st_size > found["tensor_bytes"] > 0
    table = mixkv("info", "--session", str(file)).stdout
    assert all(str(value) in table for value in found.values())
    for options in (["toy"], ["--routes"], ["--toml"], ["--k-bits", "8"]):
        refused(mixkv("info", "--session", str(file), *options), 2, "--session", "only --json")


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 300,000 bytes."""
    monkeypatch.setattr("mixkv.engine.memory.available_nbytes", lambda: 300_000)


@pytest.mark.fault("memory-plan")
def test_a_run_larger_than_memory_is_refused_before_it_begins(
    tmp_path: Path, little: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the window and bits that fit, which then do."""
    monkeypatch.setattr(Session, "_step", lambda *_: pytest.fail("work has begun"))
    options = ("-m", "toy", "-q", "-n", "1000", "--policy", "k8v8:window=900")
    result = mixkv("generate", "x" * 1000, *options, "--session", str(tmp_path / "s"))
    refused(result, 2, "a cache of 2000 tokens needs", "300000 bytes of memory are available", "window=", "would fit")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr("mixkv.engine.memory.available_nbytes", lambda: 300_000)
    words = dict(word.split("=") for word in result.stderr.split() if "=" in word)
    proposed = ("--window", words["window"], "--k-bits", words["k_bits"], "--v-bits", words["v_bits"])
    assert mixkv("generate", "x" * 1000, *options, *proposed).exit_code == 0


def test_what_a_session_holds_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s"
    run("x" * 1000, "-m", "toy", "-n", "2", "--policy", "f32", "--session", str(file))
    monkeypatch.setattr("mixkv.engine.memory.available_nbytes", lambda: 100_000)
    assert run("y", "-m", "toy", "-n", "10", "--session", str(file))["stats"]["kept_tokens"] == 1001
    result = mixkv("generate", "y" * 1000, "-m", "toy", "-q", "--session", str(file))
    refused(result, 2, "100000 bytes of memory are available")


@pytest.mark.fault("memory-plan")
def test_eval_and_bench_are_refused_too(tmp_path: Path, little: None) -> None:
    (tmp_path / "text").write_text("x" * 3000)
    refused(mixkv("eval", str(tmp_path / "text"), "-m", "toy", "-q"), 2, "3000 tokens and 1 beside it", "tokens do")
    assert mixkv("eval", str(tmp_path / "text"), "-m", "toy", "-q", "-n", "64").exit_code == 0
    result = mixkv("bench", "-m", "toy", "-q", "-p", "0", "-n", "4", "-d", "0,9000", "--kv", "k2v2,f32", "-r", "1")
    assert result.exit_code == 2 and "a cache of 9004 tokens" in result.stderr, "before the first depth"
    assert "tg4" not in result.stdout


def test_info_plans_a_context() -> None:
    found = json.loads(mixkv("info", "toy", "--context", "1000", "--json").stdout)
    session = Session(load("toy"))
    session.forward(np.arange(1000) % 250, None)
    assert found["kv_bytes"] == {"tokens": 1000, **session.nbytes()}
    assert found["available_bytes"] is None or found["available_bytes"] > 0
    assert "tokens                     1000" in mixkv("info", "toy", "--context", "1000").stdout
    refused(mixkv("info", "toy", "--context", "16385"), 2, "16384", "16385")
    refused(mixkv("info", "--toml", "--context", "5"), 2, "--context has no effect with --toml")


def test_a_place_where_the_answer_could_not_be_saved_is_refused_before_it_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SessionFileError, match="cannot be read: File name too long"):
        conversation.look(tmp_path / ("x" * 300))
    path = tmp_path / "s.kv"
    run("-m", "toy", "Once", "-n", "2", "--session", str(path))
    before = path.read_bytes()
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    refused(mixkv("generate", "-m", "toy", "x", "--session", str(path)), 7, "cannot be saved", "cannot be written to")
    assert path.read_bytes() == before


def test_retier_of_a_session_that_there_is_not_yet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.kv"
    options = ["--session", str(path), "--k-bits", "8", "--retier"]
    refused(mixkv("generate", "-m", "toy", "x", *options), 2, "--retier has no effect", str(path))
    assert not path.exists()
