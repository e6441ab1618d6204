"""Writes reference.json: what transformers' apply_chat_template makes of the conversations with each template of models/.

    pip install transformers
    python tests/data/chat_templates/make_reference.py

For each template and case: the SHA-256 of the text (the text itself for one case of each template, to be read), or null
where the template refuses the conversation.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from conversations import CONVERSATIONS, NOW, TOKENS, TOOLS, VARIABLES, cases
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
SHOWN = ("several with system", True, True, "")  # the case whose text is kept


class Fixed(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> "Fixed":
        """Always the same day."""
        return cls(*NOW)


def main() -> None:
    """See above."""
    chat_template_utils.datetime = Fixed
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    recorded: dict[str, Any] = {}
    for file in sorted((HERE / "models").glob("*.jinja")):
        rows: list[str | None] = []
        shown = None
        for case in cases():
            name, tools, ask, variables = case
            try:
                text = tokenizer.apply_chat_template(
                    CONVERSATIONS[name], tools=TOOLS if tools else None, chat_template=file.read_bytes().decode(),
                    add_generation_prompt=ask, tokenize=False, **VARIABLES[variables],
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001 - templates raise what they like
                print(file.stem, case, type(error).__name__, str(error)[:80])
                rows.append(None)
                continue
            rows.append(hashlib.sha256(text.encode()).hexdigest()[:16])
            shown = text if case == SHOWN else shown
        recorded[file.stem] = {"shown": shown, "digests": rows}
    text = json.dumps(recorded, indent=1, ensure_ascii=True)
    (HERE / "reference.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
