"""What the hub has and this machine has not, file by file, with errors that say what to do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .sd3_files import (
    CLIP_TOKENIZER_FILES,
    LINK,
    PARTS,
    PUBLISHED,
    T5_TOKENIZER,
    Files,
    Location,
    Repository,
    cache_folder,
    snapshots,
)

OFFLINE = "give the model's files with --checkpoint PATH, or go online"
GATED = (401, 403)


def download_transformer(model: str) -> Files:
    """The published single file of a model, which its VAE is in too."""
    published = PUBLISHED[model]
    path = download(published, f"the weights of {model}")
    return Files(path, (path.parent, *snapshots()), None)


def download_part(name: str) -> Location:
    """A text encoder."""
    part = PARTS[name]
    return Location(download(part.published, f"the {part.title}"))


def download_tokenizer(name: str) -> Path:
    """The folder with a tokenizer's files."""
    if name == "t5":
        return fetch(T5_TOKENIZER, "T5's tokenizer", whole_tokenizer)
    repository, folder = PARTS[name].published.name, f"tokenizer_{name[-1]}"
    files = [Repository(repository, f"{folder}/{file}") for file in CLIP_TOKENIZER_FILES]
    return [download(file, "CLIP's tokenizer") for file in files][0].parent


def download(what: Repository, title: str) -> Path:
    """One file, from the hub's cache where it is there already."""

    def hub_download(repository: str) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, what.file)

    return fetch(what.name, title, hub_download)


def whole_tokenizer(repository: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repository, allow_patterns=["*.json", "spiece.model"])


def fetch(repository: str, title: str, get: Callable[[str], str]) -> Path:
    """What `get` gives for a repository; whatever hinders it is one line with the way out."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"{title} must be downloaded, and huggingface_hub is not installed; install with: "
            "pip install 'ditq[sd3]'"
        )
    try:
        return Path(get(repository))
    except Exception as error:
        raise UserError(explained(error, repository, title)) from error


def explained(error: Exception, repository: str, title: str) -> str:
    """What a failed download means and what to do; errors of the hub's client and of its network
    libraries are told apart by status and name, which are older than any one version's classes."""
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names or status in GATED:
        return (
            f"the hub refuses {title} ({repository}): accept its licence at {LINK}{repository}, "
            "then sign in with a token that may read it: hf auth login"
        )
    if "RepositoryNotFoundError" in names or "EntryNotFoundError" in names or status == 404:
        if "LocalEntryNotFoundError" not in names:
            return f"{LINK}{repository} does not have {title} any more; {OFFLINE}"
    if isinstance(error, OSError) and error.errno == 28:
        return f"the disk of {cache_folder()} is full; it has no room for {title}"
    return (
        f"{cache_folder()} does not hold {title}, and {repository} cannot be reached "
        f"({type(error).__name__}); {OFFLINE}"
    )
