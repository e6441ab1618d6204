"""The command line as a person meets it: stdout, stderr and exit codes. Mostly on the toy model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mixkv import CachePolicy, Override, Tier, __version__, cli
from mixkv.commands import shell

from .refusals import refused

REPOSITORY = Path(cli.__file__).parent
RUNNER = CliRunner()


def mixkv(*arguments: str, text: str | bytes | None = None) -> Result:
    return RUNNER.invoke(cli.app, list(arguments), input=text)


def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mixkv.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )  # type: ignore[call-overload]


def test_text_goes_to_stdout_and_statistics_to_stderr() -> None:
    result = mixkv("generate", "hello", "--model", "toy", "--max-tokens", "12")
    assert result.exit_code == 0
    assert len(result.stdout) == 13 and result.stdout.endswith("\n")
    assert "prompt 5 tokens" in result.stderr and "generated 12 tokens" in result.stderr
    assert (
        "sink" in result.stderr and "old" in result.stderr and "recent" in result.stderr and "float16" in result.stderr
    )
    assert "tokens/s" in result.stderr


def test_quiet_says_nothing_on_stderr() -> None:
    result = mixkv("generate", "hello", "--model", "toy", "--max-tokens", "3", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")


def test_json_is_one_object_with_everything_in_it() -> None:
    plain = mixkv("generate", "hello", "-m", "toy", "-n", "9", "-q").stdout
    result = mixkv("generate", "hello", "-m", "toy", "-n", "9", "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {"text", "prompt_ids", "token_ids", "finish_reason", "stats"}
    assert answer["prompt_ids"] == list(b"hello") and len(answer["token_ids"]) == 9
    assert answer["text"] + "\n" == plain and answer["finish_reason"] == "length"
    stats = answer["stats"]
    assert stats["prompt_tokens"] == 5 and stats["generated_tokens"] == 9
    assert set(stats["kv_bytes"]) == {"sink", "old", "recent", "total"}
    assert stats["kv_bytes_float16"] == 3 * 2 * 16 * 2 * 2 * (5 + 8)  # the last token was not fed back
    assert stats["policy"] == "sinks=4 recent=128:f16 tile=64 old=k4c/v4t rot=kv scales=fit"


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8", "q4"])
def test_text_is_generated_with_weights_in_every_format(weights: str) -> None:
    options = ("generate", "hello", "--model", "toy", "--weights", weights, "--json", "-n", "20")
    result = mixkv(*options)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert len(answer["token_ids"]) == 20 and answer["text"].isprintable() and answer["finish_reason"] == "length"
    assert json.loads(mixkv(*options, "--threads", "1").stdout)["token_ids"] == answer["token_ids"]


def test_the_prompt_comes_from_argument_file_or_stdin(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("grün".encode())
    common = ("generate", "-m", "toy", "-n", "1", "--json")
    for arguments, text in (((*common, "grün"), None), ((*common, "--file", str(file)), None), (common, "grün"),
                            ((*common, "-"), "grün")):  # fmt: skip
        answer = json.loads(mixkv(*arguments, text=text).stdout)
        assert answer["prompt_ids"] == list("grün".encode()), arguments


def test_every_sampling_option_reaches_the_sampler() -> None:
    def ids(*options: str) -> list[int]:
        return json.loads(mixkv("generate", "hello", "-m", "toy", "-n", "20", "--json", *options).stdout)["token_ids"]

    greedy = ids()
    hot = ids("--temperature", "5", "--seed", "1")
    assert hot != greedy and hot == ids("--temperature", "5", "--seed", "1") != ids("--temperature", "5", "--seed", "2")
    for narrowing in (("--top-k", "1"), ("--top-p", "0.001"), ("--min-p", "1")):
        assert ids("--temperature", "5", "--seed", "1", *narrowing) == greedy, narrowing
    penalized = ids("--repeat-penalty", "100")
    assert len(set(penalized)) > len(set(greedy)) or penalized != greedy


def test_stop_ends_the_text_before_the_stop_string() -> None:
    whole = mixkv("generate", "hello", "-m", "toy", "-n", "30", "-q").stdout
    stop = whole[4:7]
    result = mixkv("generate", "hello", "-m", "toy", "-n", "30", "--stop", stop, "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == whole[: whole.index(stop)] and answer["finish_reason"] == "stop"


def test_every_cache_option_reaches_the_policy() -> None:
    options = ["--window", "32", "--sinks", "2", "--k-bits", "8", "--v-bits", "16", "--tile", "32", "--dense", "f32"]
    options += ["--rotate", "v", "--scales", "range"]
    result = mixkv("generate", "x" * 200, "-m", "toy", "-n", "2", "--json", *options)
    stats = json.loads(result.stdout)["stats"]
    assert stats["policy"] == "sinks=2 recent=32:f32 tile=32 old=k8c/v16 rot=v scales=range"
    assert stats["kv_bytes"]["old"] > 0 and stats["kv_bytes"]["sink"] == 3 * 2 * 2 * 2 * 16 * 4


def info_policy(*options: str) -> str:
    result = mixkv("info", "toy", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["policy"]


def test_a_policy_is_given_by_name_line_or_file_and_options_change_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("window = 7\nv_bits = 2\n[[overrides]]\nlayers = '-1'\nk_bits = 8\n")
    plain = "sinks=4 recent=128:f16 tile=64 old=k4c/v4t"
    default = f"{plain} rot=kv scales=fit"
    mine = "recent=7:f16 tile=64 old=k4c/v2t rot=kv scales=fit{} layers=-1[k_bits=8]"
    for options, policy in (
        ([], default),
        (["--policy", "f16"], "sinks=0 recent=0:f16 tile=64 old=k16/v16 rot=none scales=fit"),
        (["--policy", "k8v2:window=9"], "sinks=4 recent=9:f16 tile=64 old=k8c/v2t rot=kv scales=fit"),
        (["--policy", "rot=k old=k2t16/v4c"], "sinks=4 recent=128:f16 tile=64 old=k2t16/v4c rot=k scales=fit"),
        (["--policy", "rot=k old=k2t16/v4c", "--rotate", "v", "--k-group", "0"],
         "sinks=4 recent=128:f16 tile=64 old=k2t/v4c rot=v scales=fit"),
        (["--policy", "rot=k", "--rotate", "none"], f"{plain} rot=none scales=fit"),
        (["--policy", "rot=k", "--scales", "range"], f"{plain} rot=k scales=range"),
        (["--policy", "scales=range", "--scales", "fit", "--rotate", "kv"], default),
        (["--policy", str(file)], f"sinks=4 {mine.format('')}"),
        (["--sinks", "0", "--policy", str(file), "--rollback", "3"], f"sinks=0 {mine.format(' rollback=3')}"),
        (["--k-axis", "token", "--v-axis", "channel"], "sinks=4 recent=128:f16 tile=64 old=k4t/v4c rot=kv scales=fit"),
        (["--k-axis", "token", "--k-group", "16", "--v-group", "16"],
         "sinks=4 recent=128:f16 tile=64 old=k4t16/v4t16 rot=kv scales=fit"),
        (["--window", "1", "--k-bits", "8", "--v-bits", "2", "--tile", "32", "--dense", "f32"],
         "sinks=4 recent=1:f32 tile=32 old=k8c/v2t rot=kv scales=fit"),
    ):  # fmt: skip
        assert info_policy(*options) == policy, options


def test_a_policy_reaches_the_text_and_its_statistics() -> None:
    options = ("generate", "x" * 200, "-m", "toy", "-n", "2", "--json")
    stats = json.loads(mixkv(*options, "--policy", "k8v16:window=32:sinks=2:tile=32:dense=f32").stdout)["stats"]
    assert stats["policy"] == "sinks=2 recent=32:f32 tile=32 old=k8c/v16 rot=kv scales=fit"
    assert stats["kv_bytes"]["sink"] == 3 * 2 * 2 * 2 * 16 * 4


def test_info_prints_a_policy_its_digest_and_its_toml(tmp_path: Path) -> None:
    policy = CachePolicy(older=(Tier(300, k_bits=2),), overrides=(Override("0", older=(), v_bits=16, window=5),))
    described = json.loads(mixkv("info", "toy", "--json", "--policy", str(policy)).stdout)
    assert described["policy"] == str(policy) and described["policy_digest"] == policy.digest
    assert CachePolicy.from_toml(described["policy_toml"]) == policy
    # Of a token and layer, 2 heads of 16 channels: codes, and 4 bytes a channel and tile (K) or a token (V)
    k4, k2, v4, v16 = (2 * (8 + 1), 2 * (4 + 1), 2 * (8 + 4), 2 * 32)
    assert described["kv_bytes_per_old_token"] == k4 + v16 + 2 * (k4 + v4)
    assert described["kv_bytes_per_old2_token"] == k4 + v16 + 2 * (k2 + v4)
    assert described["kv_bytes_per_recent_token"] == 3 * 2 * 2 * 32
    text = mixkv("info", "toy", "--policy", str(policy)).stdout
    assert str(policy) in text and policy.digest in text and "policy_toml" not in text
    routes = json.loads(mixkv("info", "--routes", "--json", "--policy", str(policy)).stdout)
    assert routes["policy"] == str(policy) and list(routes["routes"]["segments"]) == ["sink", "old", "old2", "recent"]

    only = mixkv("info", "--policy", str(policy), "--rollback", "8", "--toml")
    assert (only.exit_code, only.stderr) == (0, "")
    file = tmp_path / "mine.toml"
    file.write_text(only.stdout)
    assert CachePolicy.load(file) == dataclasses.replace(policy, rollback=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "k5v4"], ["cache policy 'k5v4': k_bits", "nearest is 4"]),
        (["--policy", ""], ["cache policy ''", "balanced, small, tiny"]),
        (["--policy", "none.toml"], ["none.toml: no such file"]),
        (["--policy", "old=k4c/v4t48"], ["old: v_group by token must be one of 16 at head_dim 16", "nearest is 16"]),
        (["--policy", "layers=3[sinks=0]"], ["layers 3: 3 must be from 0 to 2", "nearest is 2"]),
        (["--policy", "f16", "--k-axis", "token"], ["k_axis must be channel at k_bits 16"]),
        (["--rotate", "q"], ["rotate must be one of none, k, v, kv, found 'q'"]),
        (["--scales", "best"], ["scales must be one of fit, range, found 'best'"]),
        (["--rollback", "-1"], ["rollback", "0 to 16777216", "nearest is 0"]),
        (["--k-axis", "head"], ["k_axis must be one of channel, token, found 'head'"]),
        (["--toml"], ["MODEL, --json has no effect with --toml"]),
    ],
)
def test_a_policy_that_is_none_is_refused(options: list[str], words: list[str]) -> None:
    refused(mixkv("info", "toy", "--json", *options), 2, *words)


def test_the_context_ends_the_text() -> None:
    answer = json.loads(mixkv("generate", "hello", "-m", "toy", "--context", "9", "--json").stdout)
    assert answer["finish_reason"] == "context" and len(answer["token_ids"]) == 5


def test_info_models_and_version() -> None:
    described = json.loads(mixkv("info", "toy", "--json", "--k-bits", "8").stdout)
    assert described["architecture"] == "llama" and described["layers"] == 3
    assert described["kv_bytes_per_token_float16"] == 3 * 2 * 16 * 4
    assert "head_dim" in mixkv("info", "toy").stdout
    assert {row["name"] for row in json.loads(mixkv("models", "--json").stdout)} >= {"smollm2", "toy"}
    assert "toy" in mixkv("models").stdout
    assert mixkv("--version").stdout.strip() == f"mixkv {__version__}"


def test_python_looks_for_garbage_seldom_and_not_at_its_end() -> None:
    """Both are settings of the interpreter, so a process of its own tells what they are behind a command."""
    program = (
        "import gc, sys\nfrom mixkv import cli\nsys.argv = ['mixkv', '--version']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print(code, gc.get_threshold()[0], gc.get_freeze_count() > 10_000, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["0 10000 True True"]


@pytest.mark.fault("generate-options")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-tokens", "1000000000"], ["max_tokens", "1000000000", "16777216"]),
        (["--max-tokens", "0"], ["max_tokens", "0"]),
        (["--temperature", "nan"], ["temperature", "nan", "0 to 100"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "inf"], ["temperature", "inf"]),
        (["--top-p", "0"], ["top_p", "above 0"]),
        (["--top-p", "2"], ["top_p", "2.0", "at most 1"]),
        (["--min-p", "-0.1"], ["min_p", "0 to 1"]),
        (["--top-k", "-1"], ["top_k", "-1"]),
        (["--repeat-penalty", "0"], ["repeat_penalty"]),
        (["--seed", "-1"], ["seed"]),
        (["--stop", ""], ["stop", "empty"]),
        (["--window", "-1"], ["window", "-1", "0 to"]),
        (["--sinks", "-1"], ["sinks", "-1", "0 to"]),
        (["--k-bits", "5"], ["k_bits", "5", "nearest is 4"]),
        (["--v-bits", "9"], ["v_bits", "9", "nearest is 8"]),
        (["--tile", "100"], ["tile", "100", "nearest is 128"]),
        (["--dense", "f8"], ["dense", "f8", "f16, bf16, f32"]),
        (["--weights", "q5"], ["weights", "q5", "auto, f32, bf16, q8, q4"]),
        (["--threads", "100000"], ["--threads", "100000", "cores"]),
        (["--threads", "0"], ["--threads", "found 0"]),
        (["--context", "0"], ["context", "0"]),
        (["--context", "99999999"], ["context", "99999999", "16384"]),
        (["--top-p", "0.5", "--top-k", "3"], ["--top-k, --top-p", "temperature 0"]),
        (["--chat"], ["no chat template"]),
        (["--system", "be kind"], ["--system", "chat template"]),
    ],
)
def test_an_option_out_of_range_is_refused_with_name_and_range(options: list[str], words: list[str]) -> None:
    """More than the cores, NaN temperatures, top-p of 2 and the like; also options that could have no effect."""
    refused(mixkv("generate", "hello", "--model", "toy", "-q", *options), 2, *words)


def test_a_prompt_from_two_places_is_refused(tmp_path: Path) -> None:
    refused(mixkv("generate", "hello", "--file", str(tmp_path / "x"), "-m", "toy"), 2, "--file")


@pytest.mark.fault("generate-options")
def test_an_empty_prompt_is_refused() -> None:
    refused(mixkv("generate", "", "-m", "toy", "-q"), 5, "empty")


@pytest.mark.fault("context-overflow")
def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    refused(mixkv("generate", "x" * 100, "-m", "toy", "--context", "64", "-q"), 5, "100", "64")


@pytest.mark.fault("long-prompt")
def test_megabytes_of_one_character_are_refused_before_they_are_tokenized() -> None:
    started = time.perf_counter()
    refused(mixkv("generate", "-m", "toy", "-q", text=b"a" * (17 << 20)), 5, "16777216 bytes")
    assert time.perf_counter() - started < 5


@pytest.mark.fault("invalid-utf8")
def test_a_prompt_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9 au lait")
    refused(mixkv("generate", "--file", str(file), "-m", "toy", "-q"), 5, str(file), "byte 3")
    refused(mixkv("generate", "--file", str(tmp_path / "none"), "-m", "toy", "-q"), 5, "cannot be read")


@pytest.mark.fault("invalid-utf8")
def test_a_prompt_with_a_lone_surrogate_is_refused() -> None:
    refused(mixkv("generate", "a\udc80b", "-m", "toy", "-q"), 5)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    refused(mixkv("generate", "x", "-m", "no-such-model", "-q"), 2, "no-such-model", "smollm2", "toy")
    refused(mixkv("pull", "no-such-model", "-q"), 2, "no-such-model", "smollm2")


def test_a_name_that_cannot_be_looked_up_is_refused() -> None:
    refused(mixkv("info", "a" * 300, "--json"), 2, "aaa")
    refused(mixkv("info", "~nobody-of-this-name/x", "--json"), 2, "nobody")


def test_toy_needs_no_pull() -> None:
    result = mixkv("pull", "toy")
    assert result.exit_code == 0 and "built in" in result.stderr


@pytest.mark.fault("closed-stdout")
@pytest.mark.parametrize("command", ["models", "info toy", "generate hello --model toy -n 3"])
def test_a_full_or_closed_stream_is_no_traceback(command: str) -> None:
    program = f"{sys.executable} -m mixkv {command}"
    for redirection, code in ((">/dev/full", 1), (">&-", 2), ("2>&-", 0)):
        done = subprocess.run(f"{program} {redirection}", shell=True, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, (redirection, done)
        assert "tokens/s" not in done.stdout
    done = subprocess.run(f"{program} <&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_character_that_the_terminal_lacks_is_replaced(clean_env: dict[str, str]) -> None:
    options = ["--temperature", "100", "--seed", "1", "-n", "60", "-q"]
    process = start("generate", "hello", "-m", "toy", *options, env={**clean_env, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == b"" and b"?" in out


def test_threads_default_to_what_numba_was_given(clean_env: dict[str, str]) -> None:
    process = start("generate", "hello", "-m", "toy", "-n", "2", "--json", env={**clean_env, "NUMBA_NUM_THREADS": "1"})
    out, _ = process.communicate(timeout=60)
    assert json.loads(out)["stats"]["threads"] == 1


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(mixkv("info", str(file), "--json"), 3, "Git-LFS")
    refused(mixkv("generate", "x", "-m", str(tmp_path), "-q"), 3, "config.json")


@pytest.mark.fault("no-network")
def test_no_network_is_one_line_that_says_how_to_go_on(clean_env: dict[str, str], tmp_path: Path) -> None:
    """An index that nobody listens to stands for the missing network."""
    env = {
        **clean_env, "MIXKV_CACHE": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "0",
        "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip
    env.pop("PIP_FIND_LINKS", None)
    process = start("generate", "hello", env=env)
    out, err = process.communicate(timeout=120)
    lines = [line for line in err.decode().splitlines() if line.strip()]
    assert process.returncode == 4 and out == b""
    assert len(lines) == 1 and str(tmp_path) in lines[0] and "smollm2" in lines[0].lower()


@pytest.mark.fault("closed-stdout")
def test_a_closed_stdout_ends_quietly() -> None:
    process = start("generate", "hello", "-m", "toy", "-n", "2000", "-q")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.wait(timeout=60) == shell.PIPE_CLOSED
    assert process.stderr.read() == b""


@pytest.mark.fault("interrupt")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_in_decode_keeps_the_text_and_exits_130(as_json: bool) -> None:
    options = ["--json"] if as_json else []
    process = start("generate", "hello", "-m", "toy", "-n", "16000", *options)
    assert process.stdout is not None and process.stderr is not None
    if as_json:
        _wait_for_work(process, 2.0)  # compiled kernels load; then 16,000 tokens take seven seconds and more
        head = b""
    else:
        head = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    started = time.perf_counter()
    rest, err = process.communicate(timeout=60)
    assert process.returncode == shell.INTERRUPTED
    assert time.perf_counter() - started < 5
    assert b"Traceback" not in err and b"(interrupted)" in err
    if as_json:
        answer = json.loads(rest)
        assert answer["finish_reason"] == "interrupted" and len(answer["token_ids"]) > 0
    else:
        assert len(head + rest) >= 21


@pytest.mark.fault("interrupt")
def test_ctrl_c_while_the_prompt_is_read_exits_130(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("x" * 16_000)
    process = start("generate", "--file", str(file), "-m", "toy", "-n", "1000")
    _wait_for_work(process, 0.4)  # reading takes a second and more
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == shell.INTERRUPTED
    assert b"Traceback" not in err


def _wait_for_work(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until so long after a process has begun to use the kernels' threads: then it is past its start."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        if "omppool" in maps or "workqueue" in maps:
            time.sleep(seconds)
            return
        time.sleep(0.02)
    raise AssertionError("the process did not start to compute")


def test_the_cli_starts_without_importing_numba(clean_env: dict[str, str]) -> None:
    code = "import sys, mixkv.cli; sys.exit('numba' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=clean_env).returncode == 0


@pytest.mark.model
def test_the_default_model_writes_text_and_its_template_is_used(default_model_path: Path) -> None:
    arguments = ("generate", "The capital of France is", "-m", str(default_model_path), "-n", "8", "--json")
    chat, raw = (json.loads(mixkv(*arguments, *option).stdout) for option in ((), ("--raw",)))
    assert raw["text"].startswith(" Paris")
    assert len(chat["prompt_ids"]) > len(raw["prompt_ids"]) == 5
    system = json.loads(mixkv(*arguments, "--system", "You are a pirate.").stdout)
    assert system["prompt_ids"] != chat["prompt_ids"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "x", "-m", ""], "the name of the model is empty"),
        (["info", ""], "the name of the model is empty"),
        (["info", "--routes", "--weights", "q5"], "weights must be one of"),
        (["info", "--routes", "--weights", "q8"], "--weights has no effect"),
        (["info", "--toml", "--context", "0"], "--context has no effect"),
        (["generate", "x", "-m", "toy", "--template-var", "x=" + "[" * 100_000], "--template-var"),
        (["golden", "record", "new.json", "-m", "bad\udcff.gguf"], "this one is not text"),
    ],
)
def test_what_would_be_dropped_or_end_in_a_traceback_is_refused(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(mixkv(*arguments), 2, word)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_names_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("mixkv.models.hub.cached_models", fail)
    refused(mixkv("models"), 1, "some/file: Permission denied")
