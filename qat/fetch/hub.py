"""The base from the hub into the local Hugging Face cache, where recipes find it.

huggingface_hub lists the repository with sizes and hashes and lays out the cache; the bytes come through
`qat.fetch.download`. Only safetensors, JSON and tokenizer files are taken: never a pickle, never code. The token comes
from the environment (`HF_TOKEN`) or there is none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import UserError
from qat.fetch.download import PART, RemoteFile, download, file_digest
from qat.progress import progress_bar

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = "*.safetensors"
SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
"""Beside the weights: configuration, tokenizer in its known forms, chat template, terms."""
SPARE = 1 << 30
"""Bytes that a download leaves free on the disk."""
_TOGETHER = 4


class Fetched(NamedTuple):
    """What is in the cache now.

    Attributes:
        model: Hub id.
        revision: Commit.
        folder: Snapshot in the cache.
        files: Names.
        bytes: Of all of them.
        downloaded: Bytes that had to come.
    """

    model: str
    revision: str
    folder: Path
    files: list[str]
    bytes: int
    downloaded: int

    def to_json(self) -> dict[str, Any]:
        """The fields, jsonable."""
        return {**self._asdict(), "folder": str(self.folder)}


def allowed(name: str, *, weights: bool = True) -> bool:
    """Whether a file of a repository is taken; only files at its top are."""
    patterns = (*SMALL, WEIGHTS) if weights else SMALL
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def fetch_from_hub(model: str, revision: str | None, *, weights: bool = True) -> Fetched:
    """Bring a checkpoint into the local cache; what is there already is checked and kept.

    Args:
        model: Hub id.
        revision: Commit, branch or tag; None: `main`, as it is now.
        weights: False: configuration and tokenizer alone.

    Returns:
        What is there now.

    Raises:
        UserError: No network, no such model or revision, no access, no safetensors, too little disk, wrong bytes.
    """
    import httpx

    try:
        from huggingface_hub import HfApi, hf_hub_url
    except ImportError as error:
        raise UserError(
            "huggingface_hub is not installed.", remedy="it comes with training: pip install 'qat[train]'"
        ) from error
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

    token = os.environ.get("HF_TOKEN") or False
    api = HfApi(token=token)
    with _explained(model, revision):
        commit, files = _listing(api, model, revision, weights)
        blobs = _repository(model) / "blobs"
        missing = [file for file in files if not (blobs / file.digest).is_file()]
        _require_space(blobs, missing)
        _check_present(blobs, [file for file in files if file not in missing])
        headers = build_hf_headers(token=token)
        with httpx.Client(follow_redirects=True, timeout=30.0) as client, _bar("fetching, MB", missing) as tick:

            def get(file: RemoteFile, stop: Event) -> None:
                url = hf_hub_url(model, file.name, revision=commit, endpoint=api.endpoint)
                download(client, url, headers, file, blobs / file.digest, tick, stop)

            _all(missing, get)
        folder = _link(api, model, revision, commit, files)
    total = sum(file.size for file in files)
    coming = sum(file.size for file in missing)
    return Fetched(model, commit, folder, [file.name for file in files], total, coming)


def _listing(api: HfApi, model: str, revision: str | None, weights: bool) -> tuple[str, list[RemoteFile]]:
    """Commit, and the files that are taken with the hub's own sizes and hashes."""
    info = api.model_info(model, revision=revision, files_metadata=True)
    files = [_remote(entry) for entry in info.siblings or () if allowed(entry.rfilename, weights=weights)]
    if not any(file.name == "config.json" for file in files):
        raise UserError("The repository holds no model: there is no config.json.", where="base.model", value=model)
    if weights and not any(fnmatchcase(file.name, WEIGHTS) for file in files):
        raise UserError(
            "The repository holds no safetensors weights.",
            where="base.model",
            value=model,
            remedy="pickled weights run code when they are read and are never taken: name a converted repository",
        )
    return str(info.sha), sorted(files)


def _remote(entry: Any) -> RemoteFile:
    large = entry.lfs is not None
    digest = entry.lfs.sha256 if large else entry.blob_id
    if not digest or entry.size is None:
        raise UserError("The hub gives no hash or size for a file.", where=entry.rfilename)
    return RemoteFile(entry.rfilename, int(entry.size), str(digest), large)


def _repository(model: str) -> Path:
    """The model's folder in the local cache, laid out as huggingface_hub does."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")


def _require_space(blobs: Path, missing: Sequence[RemoteFile]) -> None:
    there = [blobs / f"{file.digest}{PART}" for file in missing]
    needed = sum(file.size for file in missing) - sum(path.stat().st_size for path in there if path.is_file())
    existing = next(path for path in (blobs, *blobs.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed and needed + SPARE > free:
        raise UserError(
            "There is too little space on the disk for the base.",
            where=str(existing),
            value=f"{needed / 1e9:.1f} GB to come and {SPARE / 1e9:.1f} GB to spare, {free / 1e9:.1f} GB free",
            remedy="free some, or set HF_HOME to another disk",
        )


def _check_present(blobs: Path, present: Sequence[RemoteFile]) -> None:
    """Hash what an earlier call or another program brought; a damaged file is removed."""
    with _bar("checking, MB", present) as tick:
        for file in present:
            path = blobs / file.digest
            if path.stat().st_size != file.size or file_digest(path, file, tick) != file.digest:
                path.unlink()
                raise UserError(
                    "A file in the cache has other bytes than the hub has; it is removed.",
                    where=f"{file.name}: {path}",
                    remedy="call again: it comes anew",
                )


def _all(files: Sequence[RemoteFile], get: Any) -> None:
    """Download some at a time; the first fault, or Ctrl-C, ends all of them where they are."""
    stop = Event()
    with ThreadPoolExecutor(_TOGETHER) as pool:
        try:
            for done in [pool.submit(get, file, stop) for file in files]:
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _bar(label: str, files: Sequence[RemoteFile]) -> Iterator[Any]:
    """A bar in MB that any thread may push."""
    lock, came = Lock(), 0
    total = sum(file.size for file in files)
    if not files:
        yield lambda count: None
        return
    with progress_bar(label, max(1, total // 1_000_000)) as bar:

        def tick(count: int) -> None:
            nonlocal came
            with lock:
                came += count
                bar.update(came // 1_000_000)

        yield tick


def _link(api: HfApi, model: str, revision: str | None, commit: str, files: Sequence[RemoteFile]) -> Path:
    """Let huggingface_hub name the blobs in a snapshot; nothing is downloaded any more."""
    from huggingface_hub import hf_hub_download

    def link(name: str, at: str | None) -> Path:
        return Path(hf_hub_download(model, name, revision=at, token=api.token, endpoint=api.endpoint))

    places = [link(file.name, commit) for file in files]
    folder = places[0].parent
    if revision != commit and link("config.json", revision).parent != folder:
        raise UserError(
            "The branch moved while it was downloaded.",
            where="base.revision",
            value=revision or "main",
            remedy=f"pin it: base.revision: {commit}, or call again for the new one",
        )
    return folder


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """The hub's refusals as one clear message each."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = _fault(error, model, revision)
        if fault is None:
            raise
        raise fault from error


_PRIVATE = "There is no such model on the hub, or it is private."
_LATER = "call again later"
# Class in huggingface_hub.errors or of its HTTP library (which changes between its versions, so all go by their names)
# -> what it says, and what to do. The first class of the error's own ancestry counts.
_FAULTS = {
    "GatedRepoError": (
        "The publisher asks for consent to the model's terms.",
        "accept them on the model's page, then set HF_TOKEN to a token of that account",
    ),
    "RepositoryNotFoundError": (_PRIVATE, "look at the spelling; for a private one set HF_TOKEN"),
    "HFValidationError": ("This is no hub id.", "write it as owner/name"),
    "OfflineModeIsEnabled": ("HF_HUB_OFFLINE forbids to ask the hub.", "unset it, or name a folder: --from DIR"),
    "Refused": ("The hub refuses a file.", "set HF_TOKEN to a token with access"),
    "HfHubHTTPError": ("The hub refuses.", _LATER),
    **dict.fromkeys(
        ("LocalEntryNotFoundError", "TransportError", "ConnectionError", "TimeoutError"),
        ("The hub cannot be reached.", "look at the network; without one carry the folder here and use --from DIR"),
    ),
}


def _fault(error: Exception, model: str, revision: str | None) -> UserError | None:
    """The message for one of the hub's errors; None for a bug."""
    names = [parent.__name__ for parent in type(error).__mro__]
    if "RevisionNotFoundError" in names:
        return UserError("The model has no such revision.", where="base.revision", value=revision)
    known = next((name for name in names if name in _FAULTS), None)
    if known is None:
        return None
    what, remedy = _FAULTS[known]
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    token = os.environ.get("HF_TOKEN")
    if known == "HfHubHTTPError" and status == 401:
        what = "The token is not accepted." if token else _PRIVATE
        remedy = "set HF_TOKEN to a valid token of an account with access"
    detail = f"HTTP {status}; {'HF_TOKEN is set' if token else 'no HF_TOKEN in the environment'}"
    if status is None:
        detail = (str(error).splitlines() or [known])[0]
    return UserError(what, where="base.model", value=f"{model} ({detail})", remedy=remedy)
