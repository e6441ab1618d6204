"""What the shell gives a chat template besides the conversation: tools and variables."""

import json
import shutil
from pathlib import Path

import pytest

from mixkv import load
from mixkv.models.errors import UsageError

from .test_cli_sessions import chatty as chatty  # noqa: PLC0414 - a fixture
from .test_cli_sessions import mixkv, refused, run

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% if thinking %}{{ thinking | tojson }};{% endif %}"
    "{{ word }}|{{ messages[-1].content }}|{{ add_generation_prompt }}"
)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.fixture(scope="module")
def knowing(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template looks at tools and variables."""
    folder = tmp_path_factory.mktemp("knowing") / "model"
    shutil.copytree(chatty, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return folder


def prompt(knowing: Path, *options: str) -> str:
    return bytes(run("Hi", "-m", str(knowing), "-n", "1", *options)["prompt_ids"]).decode()


def test_tools_and_variables_reach_the_template(knowing: Path, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    assert prompt(knowing) == "|Hi|True"
    assert prompt(knowing, "--tools", str(file)) == "[look]|Hi|True"
    both = ("--template-var", 'thinking={"deep": [1, null]}', "--template-var", "word=a=b c")
    assert prompt(knowing, *both) == '{"deep": [1, null]};a=b c|Hi|True'
    assert prompt(knowing, "--template-var", "add_generation_prompt=false") == "|Hi|False"


def test_from_python(knowing: Path) -> None:
    model = load(str(knowing))
    said = [{"role": "user", "content": "Hi"}]
    assert model.chat_text(said, tools=TOOLS, word="w", add_generation_prompt=False) == "[look]w|Hi|False"
    assert model.encode_chat(said, word="w") == list(b"w|Hi|True")
    with pytest.raises(UsageError, match="never looks at thinkin, x"):
        model.chat_text(said, thinkin=True, x=1)


def test_what_has_no_effect_or_cannot_be_read_is_refused(knowing: Path, chatty: Path, tmp_path: Path) -> None:
    def found(*options: str, model: Path = knowing, code: int = 2, words: tuple[str, ...]) -> None:
        refused(mixkv("generate", "Hi", "-m", str(model), "-q", *options), code, *words)

    file = tmp_path / "tools.json"
    file.write_text("[]")
    found("--tools", str(file), model=chatty, words=("never looks at tools",))
    found("--template-var", "enable_thinking=false", words=("never looks at enable_thinking",))
    found("--template-var", "word=1", "--raw", words=("--template-var", "chat template", "--raw"))
    found("--template-var", "word", words=("'word'", "NAME=VALUE"))
    found("--template-var", "word=1", "--template-var", "word=2", words=("'word=2'", "once"))
    found("--template-var", "messages=[]", code=5, words=("'messages'", "meaning of its own"))
    found("--tools", str(tmp_path / "nothing"), code=5, words=("nothing",))
    for content, words in (("{", ("not valid JSON",)), ("{}", ("must be a JSON list", "dict"))):
        file.write_text(content)
        found("--tools", str(file), words=words)
