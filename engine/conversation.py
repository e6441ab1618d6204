"""A conversation, or a text, that a session file keeps from one run to the next: what of it is read, what is to be read.

Beside the session a file has in its metadata

    mode        "chat": turns in the model's chat template; "raw": one text that goes on
    messages    of a chat, JSON: [{"role": ..., "content": ...}, ...]; complete turns only
    text        of a raw text, JSON: {"read": n, "rest": [ids]}: the first n ids of the session, and those it has not read

What a session has read may go beyond that, or elsewhere: a run that was interrupted, a chat template that writes an answer
otherwise than it was generated. So the ids that are to be read are compared with those that were, and reading goes on where
they part.
"""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.check import shown
from ..models.errors import SessionFileError, UsageError
from ..models.load import Model
from .policy import CachePolicy
from .session import Session
from .storage import FORMAT, Saved
from .storage import describe as read_saved

Message = dict[str, str]
MODES = ("raw", "chat")


def look(path: Path) -> Saved | None:
    """What a session file holds, or None where there is none yet, but could be.

    Raises:
        SessionFileError: a file that is damaged or cannot be read; a folder that cannot be written to.

    """
    try:
        is_there = not stat.S_ISLNK(path.lstat().st_mode) or path.exists()
    except FileNotFoundError:
        is_there = False
    except (OSError, ValueError) as error:
        raise SessionFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    saved = read_saved(path) if is_there else None
    folder = Path(os.path.realpath(path)).parent  # the file is written beside its place, also where it is there already
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise OSError(0, f"{folder} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(0, f"{folder} cannot be written to")
    except (OSError, ValueError) as error:
        raise SessionFileError(f"{path}: cannot be saved: {getattr(error, 'strerror', None) or error}") from None
    return saved


def summary(path: Path) -> dict[str, Any]:
    """What is in a session file, without a model; its checksum is verified. SessionFileError where there is none."""
    saved = read_saved(path)
    chat, messages, _ = _said(path, saved)
    return {
        "session": str(path),
        "format": FORMAT,
        "mode": saved.added.get("mode", "none"),
        "messages": len(messages) if chat else 0,
        "tokens": saved.position,
        "context": saved.context,
        "policy": str(saved.policy),
        "policy_digest": saved.policy.digest,
        "model_fingerprint": saved.model,
        "bytes": path.stat().st_size,
        "tensor_bytes": saved.nbytes,
    }


def check_options(
    path: Path, saved: Saved, policy: CachePolicy, *, chat: bool | None, system: str | None, retier: bool
) -> None:
    """Compare what is asked for with what a file holds, before anything is loaded.

    Args:
        path, saved: of the file.
        policy: to go on with.
        chat: True for a chat, False for a raw text, None for what the file has.
        system: a system message.
        retier: whether the policy may be another one.

    Raises:
        UsageError: another mode, another policy, a system message where there are turns already.

    """
    is_chat, messages, _ = _said(path, saved)
    if chat is not None and chat != is_chat:
        raise UsageError(f"{path} holds a session in mode {MODES[is_chat]}, --{MODES[chat]} was given")
    if system is not None and (messages or not is_chat):
        raise UsageError(f"--system is for a new conversation: {path} has begun already")
    if policy != saved.policy and not retier:
        raise UsageError(f"{path} was saved with the policy '{saved.policy}', not '{policy}': --retier changes it")


class Conversation:
    """A session, and what is said in it: begun anew, or gone on with from a file.

    Args:
        model: what ``mixkv.load`` returned.
        policy: how the cache is kept from now on; that of the file unless given.
        chat: True for the chat template, False for raw text, None for what the file has, or the template if there is one.
        system: a system message to begin with.
        context: most tokens; as in the file, or the model's limit, unless given.
        path: of the file, if it is to be saved.
        saved: what ``look`` found there.
        template: what else its chat template is given, as ``Model.encode_chat`` takes it: tools, variables. It is not kept.

    Attributes:
        kept: tokens that the next prompt need not read again.
        retiered: what ``Session.retier`` returned, where the policy was changed.

    Raises:
        UsageError: a system message, tools or variables without a chat template; see ``Session``.
        SessionFileError: a file of another model, or damaged.

    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy | None = None,
        *,
        chat: bool | None = None,
        system: str | None = None,
        context: int | None = None,
        path: Path | None = None,
        saved: Saved | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.kept = path, 0
        self.retiered: dict[str, int] | None = None
        self.messages: list[Message] = []
        self._text = np.empty(0, np.int64)
        if path is not None and saved is not None:
            self.session = Session.load(model, path, context=context)
            self.chat, self.messages, self._text = _said(path, saved, model.config.vocab_size)
            if policy is not None and policy != self.session.policy:
                self.retiered = self.session.retier(policy)
        else:
            self.session = Session(model, policy, context=context)
            self.chat = model.has_chat_template if chat is None else chat
        if system is not None and not self.chat:
            raise UsageError("--system needs the chat template: this model has none, or --raw was given")
        if template and not self.chat:
            raise UsageError(
                "--tools and --template-var need the chat template: this model has none, or --raw was given"
            )
        self._template = dict(template or {})
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._asked: list[Message] = []
        self._target = self._text

    def prompt(self, text: str) -> list[int]:
        """The ids that the session is to read now, behind the ``kept`` tokens that it holds.

        In a chat, ``text`` is one more turn of the user. A raw text goes on with it: its ids, without what a text begins
        with, follow all those before. The session is taken back to where it and the conversation part; where that is too
        far back, it is emptied, and everything is read.

        Raises:
            UsageError: a chat without a template.
            PromptError: a text that cannot be encoded, or that the template refuses.

        """
        model, session = self.session.model, self.session
        if self.chat:
            self._asked = [*(self.messages or self._system), {"role": "user", "content": text}]
            target = model.encode_chat(self._asked, **self._template)
        else:
            target = [*self._text.tolist(), *_behind(model, text, begun=len(self._text) > 0)]
        self._target = np.array(target, np.int64)
        kept = max(min(common_prefix(self._target, session.token_ids), len(target) - 1), 0)
        if kept < session.position:
            kept = kept if kept >= session.cache.lowest else 0
            session.truncate(kept)
        self.kept = kept
        return target[kept:]

    def end(self, text: str, token_ids: Sequence[int]) -> bool:
        """Take in what was generated, and save it if anything new was read; whether it was saved.

        Args:
            text: as it was shown.
            token_ids: all that were generated, as far as it went; none where the prompt was not read to its end. Then the
                turn does not count, and what was read of it spares the next one that begins alike.

        Raises:
            SessionFileError: the file cannot be written.

        """
        if token_ids:
            if self.chat:
                self.messages = [*self._asked, {"role": "assistant", "content": text}]
            else:
                ends = self.session.model.config.eos_token_ids
                shown_ids = token_ids[:-1] if token_ids[-1] in ends else token_ids
                self._text = np.concatenate([self._target, np.array(shown_ids, np.int64)])
        if self.path is None or self.session.position <= self.kept:
            return False
        self.session.save(self.path, {**self.session.metadata, **self._metadata()})
        return True

    def _metadata(self) -> dict[str, str]:
        if self.chat:
            return {"mode": "chat", "messages": json.dumps(self.messages, ensure_ascii=False)}
        read = common_prefix(self._text, self.session.token_ids)
        return {"mode": "raw", "text": json.dumps({"read": read, "rest": self._text[read:].tolist()})}


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many ids two sequences have in common before they part."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _behind(model: Model, text: str, *, begun: bool) -> list[int]:
    """The ids of a raw text, without a beginning-of-text token where it has begun before."""
    ids = model.encode(text)
    head = model.encode("") if begun else []
    return ids[len(head) :] if ids[: len(head)] == head else ids


def _said(path: Path, saved: Saved, vocab: int | None = None) -> tuple[bool, list[Message], NDArray[np.int64]]:
    """Whether a file holds a chat, its messages, and the ids of its raw text; one without a mode is a raw text."""
    added, ids = saved.added, saved.token_ids
    mode = added.get("mode", "raw")
    try:
        if mode == "chat":
            messages = json.loads(added["messages"])
            if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
                raise ValueError
            return True, messages, np.empty(0, np.int64)
        if mode != "raw":
            raise ValueError
        if "text" not in added:
            return False, [], ids
        text = json.loads(added["text"])
        read, rest = text["read"], text["rest"]
        if not (_is_id(read, len(ids) + 1) and isinstance(rest, list) and all(_is_id(x, vocab) for x in rest)):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        what = "messages" if mode == "chat" else "text" if mode == "raw" else "mode"
        raise SessionFileError(f"{path}: its {what} cannot be used: {shown(added.get(what))}") from None
    return False, [], np.concatenate([ids[:read], np.array(rest, np.int64)])


def _is_message(x: object) -> bool:
    return (
        isinstance(x, dict)
        and {"role", "content"} <= x.keys()
        and all(isinstance(part, str) for pair in x.items() for part in pair)
    )


def _is_id(x: object, stop: int | None) -> bool:
    return type(x) is int and 0 <= x < (1 << 62 if stop is None else stop)
