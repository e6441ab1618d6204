"""The three things that are asked of the hub: what is in a repository, a file of it, and why not."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..check import shown
from ..errors import DownloadError, ModelError, UsageError
from .files import check_no_link, is_sha256, sync_folder

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_TIMEOUT_SECONDS = 20
_REASON_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file of a commit: its bytes, and its SHA-256, or git's SHA-1 of it where it is no large file."""

    nbytes: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a revision is: its commit, the files of it by path, and what license its card names."""

    commit: str
    files: dict[str, RepoFile]
    license: str


class _UnreachableError(DownloadError):
    """No answer, or one that broke off."""


class _TooLongError(DownloadError):
    """More bytes than a file has."""


class Client:
    """One repository of the hub at $HF_ENDPOINT or https://huggingface.co, with the user's own login or $HF_TOKEN."""

    def __init__(self, full: str, repo: str, folder: Path) -> None:
        """``full`` is what messages call the model, ``folder`` where it will be. UsageError without huggingface_hub."""
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise UsageError(f"{full}: models of the hub need one more package: pip install 'mixkv[hub]'") from None
        from huggingface_hub import constants

        self._full, self._repo, self._folder = full, repo, folder
        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._commit = ""

    def listing(self, revision: str) -> Listing:
        """The files of a revision, "" for the default branch, at the commit where it is now; that is used from then on."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        with self._explained(revision):
            info = api.model_info(self._repo, revision=revision or None, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        if not (isinstance(info.sha, str) and _COMMIT.fullmatch(info.sha)):
            raise DownloadError(f"{self._full}: {self._endpoint} answers with commit {shown(info.sha)}, which is none")
        self._commit = info.sha
        files = {each.rfilename: self._file(each) for each in info.siblings or []}
        license_name = getattr(info.card_data, "license", None)
        return Listing(info.sha, files, license_name if isinstance(license_name, str) else "")

    def _file(self, sibling: Any) -> RepoFile:
        size, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs is not None else None
        known = is_sha256(digest) if sibling.lfs is not None else isinstance(sibling.blob_id, str)
        if type(size) is not int or size < 0 or not known:
            raise DownloadError(f"{self._full}: {self._endpoint} gives no size or digest of {shown(sibling.rfilename)}")
        return RepoFile(size, digest, sibling.blob_id)

    def had(self, path: Path) -> int:
        """Bytes of a file that an earlier download has left, whole or in part."""
        return max((each.stat().st_size for each in (path, _part(path)) if each.is_file()), default=0)

    def download(self, file: str, about: RepoFile, path: Path, arrived: Callable[[int], None]) -> str:
        """Put a file of the commit at ``path``, if it has the digest that the hub names; its SHA-256.

        Bytes go to ``path`` with ".part" behind it, which is gone on with the next time. ``arrived`` is called with the
        bytes that there are.
        """
        if path.is_file() and path.stat().st_size == about.nbytes and (digest := _digest(path, about)):
            return digest
        check_no_link(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part(path)
        if part.is_symlink():
            part.unlink()  # what it leads to is not ours to write to
        pieced = self._fetch(file, about, part, arrived)
        if pieced and not _digest(part, about):  # what was there before, or what was put behind it, was something else
            part.unlink()
            self._fetch(file, about, part, arrived)
        digest = _digest(part, about)
        if not digest:
            with part.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            part.unlink()
            expected = about.sha256 or f"that of git object {about.blob_id}"
            raise DownloadError(f"{self._full}: {file} has sha256 {found}, expected {expected}; it was removed")
        os.replace(part, path)
        sync_folder(path.parent)
        return digest

    def _fetch(self, file: str, about: RepoFile, part: Path, arrived: Callable[[int], None]) -> bool:
        """Fetch what ``part`` lacks of a file; whether it was put together from several answers."""
        with part.open("ab") as opened:
            target = _Counted(opened, about.nbytes, arrived)
            arrived(target.tell())
            pieced = target.tell() > 0
            while target.tell() < about.nbytes:
                before = target.tell()
                pieced = pieced or before > 0
                try:
                    self._get(file, about, target)
                except _UnreachableError:
                    if target.tell() <= before:  # else the connection broke after something had come: go on there
                        raise
                except _TooLongError:
                    if not pieced:
                        raise
                    break
            opened.flush()
            os.fsync(opened.fileno())
        return pieced

    def _get(self, file: str, about: RepoFile, target: "_Counted") -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self._repo, file, revision=self._commit, endpoint=self._endpoint)
        with self._explained(self._commit, target):
            http_get(
                url,
                target,
                resume_size=target.tell(),
                headers=build_hf_headers(library_name="mixkv") | {"Accept-Encoding": "identity"},
                expected_size=about.nbytes,
                displayed_filename=file,
            )

    @contextlib.contextmanager
    def _explained(self, revision: str, target: "_Counted | None" = None) -> Iterator[None]:
        """Let the library be silent, and say in one line what went wrong."""
        from huggingface_hub import errors

        missing = f"no such repository at {self._endpoint}, or a private one"
        at = f" at revision {shown(revision)}" if revision else ""
        login = "log in with `hf auth login`, or set HF_TOKEN"
        try:
            with _silent():
                yield
        except errors.GatedRepoError as error:
            page = f"{self._endpoint}/{self._repo}"
            raise self._failed(f"gated: accept its terms at {page}, then {login}") from error
        except errors.RepositoryNotFoundError as error:
            raise self._failed(f"{missing}: {login}") from error
        except errors.RevisionNotFoundError as error:
            raise self._failed(f"the repository has no revision {shown(revision)}") from error
        except errors.EntryNotFoundError as error:
            raise self._failed("a file that the hub lists is not there") from error
        except errors.HfHubHTTPError as error:
            code = error.response.status_code if error.response is not None else "an error"
            hint = f": {login}" if code == 403 else ""
            what = f"{missing}: {login}" if code == 401 else f"{self._endpoint} answers {code}{hint}"
            raise self._failed(what) from error
        except (DownloadError, ModelError, BrokenPipeError):
            raise
        except Exception as error:  # the library's transport has classes of its own, by its version
            if target is not None and target.failed is not None:
                raise target.failed from None  # of the disk, or of whoever watches the progress
            raise _UnreachableError(
                f"{self._full}: could not reach {self._endpoint} for it{at} [{_reason(error)}]; it would be stored in "
                f"{self._folder}; to supply it by hand, download its files elsewhere into one folder (config.json, "
                "tokenizer.json and .safetensors files, or one .gguf file), and name that as the model"
            ) from error

    def _failed(self, what: str) -> DownloadError:
        return DownloadError(f"{self._full}: {what}")


class _Counted:
    """What http_get writes to: counts the bytes, and takes no more than there are to come."""

    def __init__(self, file: BinaryIO, limit: int, arrived: Callable[[int], None]) -> None:
        self._file, self._limit, self._arrived = file, limit, arrived
        self.failed: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            if self._file.tell() + len(data) > self._limit:
                raise _TooLongError(f"more than the {self._limit:,} bytes that the hub names arrive")
            written = self._file.write(data)
            self._arrived(self._file.tell())
            return written
        except BaseException as error:
            self.failed = error
            raise

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def truncate(self) -> int:
        return self._file.truncate()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _digest(path: Path, about: RepoFile) -> str:
    """The file's SHA-256 if it is the one that the hub names, else ""."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if about.sha256 is not None:
            return digest if digest == about.sha256 else ""
        file.seek(0)  # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
        blob = hashlib.sha1(b"blob %d\0" % about.nbytes, usedforsecurity=False)
        found = hashlib.file_digest(file, lambda: blob).hexdigest()
    return digest if found == about.blob_id else ""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No bars and no warnings of the library's own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, off = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    if not off:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not off:
            enable_progress_bars()


def _reason(error: Exception) -> str:
    """What the library says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 1] + "…"
