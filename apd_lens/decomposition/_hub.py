"""Decompositions on the Hugging Face Hub: published, and loaded from there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apd_lens._errors import ApdError, ArtifactError, InvalidSetting, MissingExtra
from apd_lens._files import user_path
from apd_lens.data._inputs import ValidFn
from apd_lens.decomposition._artifact import CARD_FILE, JSON_FILE, OLD_JSON_FILE, TENSOR_FILE
from apd_lens.decomposition._card import Card
from apd_lens.decomposition._decomposition import Decomposition
from apd_lens.decomposition._load import load
from apd_lens.passes._output import OutputFn


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    model: Any,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    output: OutputFn | None = None,
    valid: ValidFn | None = None,
    other_dtype: bool = False,
) -> Decomposition:
    """Loads a published decomposition onto the model that it was made from.

    Args:
        path_or_repo: a folder, which needs no network, or a repository of the Hugging Face Hub, "owner/name". A folder
            that is there comes first.
        model: as in `load`, and so are `output`, `valid` and `other_dtype`.
        revision: of the repository: a branch, a tag or a commit. A commit is always the same decomposition.
        local_files_only: take what was downloaded before. Where the Hub cannot be reached, that is taken anyway.
        token: of your account, for what is private; None for that of `hf auth login`.
        cache_dir: where to keep what is downloaded; None for the Hub's own place.

    Only the decomposition's own files are downloaded. No code of a repository runs.

    Raises:
        ArtifactError: no such folder, repository or revision; the Hub cannot be reached; or as `load`.
        InvalidSetting: a revision of a folder.
        MissingExtra: huggingface_hub is not installed, and it is no folder.
    """
    path = user_path(path_or_repo)
    if not path.is_dir():
        with _hub(path_or_repo, revision) as hub:
            files = [JSON_FILE, OLD_JSON_FILE, TENSOR_FILE, CARD_FILE]
            options = {"revision": revision, "local_files_only": local_files_only, "token": token}
            path = Path(hub.snapshot_download(str(path_or_repo), cache_dir=cache_dir, allow_patterns=files, **options))
    elif revision is not None:
        raise InvalidSetting(f"{path} is a folder, which has no revisions. Leave revision={revision!r} away.")
    return load(path, model, output=output, valid=valid, other_dtype=other_dtype)


def push_to_hub(
    decomposition: Decomposition,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a decomposition",
    card: Card | None = None,
) -> str:
    """Publishes the decomposition as one commit to a repository of the Hugging Face Hub, made if there is none.
    `apd_lens.from_pretrained` loads it. What the repository holds of an earlier one is replaced.

    Args:
        repo: "owner/name".
        revision: the branch, which is made if there is none; None for the main one.
        private: whether others may not see it; None for what it is, or what new ones of the owner are.
        token: of your account; None for that of `hf auth login`.
        card: what README.md says beside what is known.

    Returns:
        The address of the commit; its `oid` is the commit's name, a revision that never changes.

    Raises:
        ArtifactError: the Hub cannot be reached, or refuses; the repository holds something else, or is public where
            it was to be private; or as `save`.
        MissingExtra: huggingface_hub is not installed.
    """
    with _hub(repo, revision) as hub, TemporaryDirectory() as folder:
        api = hub.HfApi(token=token, library_name="apd_lens")
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.model_info(repo, revision=revision)
        names = {file.rfilename for file in there.siblings} - {".gitattributes", CARD_FILE}
        if names and TENSOR_FILE not in names:
            raise ArtifactError(
                f"The repository {repo} holds something else: {', '.join(sorted(names)[:5])}. Choose a new name."
            )
        if private is not None and there.private != private:
            raise ArtifactError(
                f"The repository {repo} is there already, and {'private' if there.private else 'public'}; nothing was "
                f"uploaded. Leave private={private} away, or change it: "
                f"huggingface_hub.update_repo_settings({repo!r}, private={private})."
            )
        decomposition.save(folder, card=card, repo=repo)
        changes = [hub.CommitOperationAdd(file, f"{folder}/{file}") for file in (JSON_FILE, TENSOR_FILE, CARD_FILE)]
        if OLD_JSON_FILE in names:
            changes.append(hub.CommitOperationDelete(OLD_JSON_FILE))
        return api.create_commit(repo, changes, commit_message=commit_message, revision=revision)


Decomposition.push_to_hub = push_to_hub  # here, so that a decomposition knows nothing of the Hub


@contextmanager
def _hub(repo: str | os.PathLike[str], revision: str | None) -> Iterator[Any]:
    """Gives huggingface_hub. Inside, its errors become ArtifactErrors that say what to do."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra(
            "The Hugging Face Hub needs huggingface_hub. Install it with pip install 'apd-lens[hub]'"
        ) from None
    try:
        yield huggingface_hub
    except ApdError:
        raise
    except Exception as error:  # of whatever kind the library, and what it stands on, raises
        raise ArtifactError(_what_to_do(error, str(repo), revision, huggingface_hub)) from error


def _what_to_do(error: Exception, repo: str, revision: str | None, hub: Any) -> str:
    errors, place = hub.errors, hub.constants.ENDPOINT
    login = "log in with `hf auth login`, or give token="
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"Expected a repository 'owner/name' of the Hub, or a folder that is there, got {repo!r}."
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} asks for consent. Open {place}/{repo}, agree there, and {login}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no folder and, at {place}, no repository {repo} that you may see. Check the name; if it is "
            f"private, {login}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. Give a branch, a tag or a commit that {place}/{repo} lists."
    if status in (401, 403):
        return f"{place} does not let you write to {repo}: {login}, of an account that may. ({error})"
    if status is not None:
        return f"{place} refused, with status {status}: {error}"
    if isinstance(error, errors.LocalEntryNotFoundError) and not isinstance(error.__cause__, Exception):
        return f"{repo} was not downloaded before, at revision {revision or 'main'}. Leave local_files_only away."
    return (
        f"{place} cannot be reached, or something went wrong on the way: {type(error.__cause__ or error).__name__}. "
        "Try again with a network. A folder needs none: decomposition.save(path), apd_lens.load(path, model). "
        f"({error})"
    )
