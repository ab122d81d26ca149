"""Erasures on the Hugging Face Hub: pushed with their card, read from there or from the cache.

A repository holds the delta and, where that is asked for, the adapter that
``pipe.load_lora_weights`` reads.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from realera_fast.erasure.export import LORA_FILE, component_of
from realera_fast.erasure.model_card import write_card
from realera_fast.runtime import read_header

if TYPE_CHECKING:
    from realera_fast.erasure.erasure import Erasure

DELTA_FILE = "erasure.safetensors"
"""What the delta is called in a repository, and in folders of the command line."""
_REPORT = "realera_fast.report_sha256"


class HubError(OSError):
    """A repository can't be read or written. The message says what to do."""


class OnHub:
    """What an `Erasure` does with the Hugging Face Hub."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter: bool | str | os.PathLike[str] = False,
        model: nn.Module | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Uploads the delta and a model card to a repository, which is made where it is not there.

        Args:
            repo_id: such as "name/sd14-without-cats".
            adapter: put an adapter beside it, for ``pipe.load_lora_weights(repo_id)``: True makes
                one as `Erasure.save_lora` does, a path takes one that this wrote.
            model: for the adapter, as `Erasure.save_lora` takes it.
            private: whether a new repository is; None leaves it to the account.
            revision: branch, which must be there; None is the main one.
            commit_message: None names the concepts.
            token: of the account; None is the one that is logged in.
            endpoint: of another Hub than huggingface.co.

        Returns:
            The address of the commit.

        Raises:
            HubError: the Hub can't be reached or refuses; nothing was lost, `save` works without.
            ValueError: `repo_id` is no name of a repository, or the adapter is another erasure's.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        erasure = cast("Erasure", self)
        # A name that can't be one costs no work.
        validate_repo_id(repo_id)
        names = ", ".join(concept.target for concept in erasure.concepts[:5]) or "nothing"
        api = HfApi(endpoint=endpoint, token=token)
        with tempfile.TemporaryDirectory() as staged:
            folder = Path(staged)
            _stage(erasure, folder, repo_id, adapter, model)
            with _explained(repo_id, pushing=True):
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message or f"Erasure of {names}",
                )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | os.PathLike[str],
        *,
        filename: str = DELTA_FILE,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> Erasure:
        """Reads what :meth:`push_to_hub` uploaded; the file is checked as `Erasure.load` does.

        Args:
            repo_id: such as "name/sd14-without-cats", or a folder with such a file.
            filename: of the delta in it.
            revision: branch, tag or commit; None is the main branch.
            cache_dir: None is the Hugging Face cache.
            local_files_only: read the cache alone.
            token: of the account; None is the one that is logged in.
            endpoint: of another Hub than huggingface.co.

        Raises:
            HubError: it is not there, or neither the cache nor the Hub can be read.
            ErasureFileError: it is not a valid erasure.
        """
        from huggingface_hub import HfApi

        kind = cast("type[Erasure]", cls)
        folder = Path(repo_id).expanduser()
        if folder.is_dir():
            return kind.load(folder / filename)
        with _explained(str(repo_id), pushing=False):
            path = HfApi(endpoint=endpoint, token=token).hf_hub_download(
                str(repo_id),
                filename,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        return kind.load(path)


def _stage(
    erasure: Erasure,
    folder: Path,
    repo_id: str,
    adapter: bool | str | os.PathLike[str],
    model: nn.Module | None,
) -> None:
    """Writes all that is uploaded into an empty folder."""
    delta = erasure.save(folder / DELTA_FILE)
    for card in folder.glob("*.md"):
        # The repository has one card, which says how to read it from there.
        card.unlink()
    if adapter is True:
        erasure.save_lora(folder, model)
    elif adapter is not False:
        path = Path(adapter)
        given = path / LORA_FILE if path.is_dir() else path
        metadata = read_header(given).metadata
        if metadata.get(_REPORT) != erasure.metadata()[_REPORT]:
            raise ValueError(
                f"adapter: {given} is of another erasure than this one; pass one that its "
                "save_lora wrote, or adapter=True"
            )
        shutil.copyfile(given, folder / LORA_FILE)
    write_card(
        delta,
        erasure,
        use="hub" if adapter is False else "lora-hub",
        component=component_of(erasure.provenance),
        alone=True,
        repo=repo_id,
    )


@contextmanager
def _explained(repo_id: str, *, pushing: bool) -> Iterator[None]:
    """Says of what the Hub answers what to do about it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo_id}: you have no access to it yet; ask for it on its page, and log in: "
            "hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: it has no such revision; see its branches and tags") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: no such repository, or it is private: check the name, and log in "
            "(hf auth login, or pass token)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(_unreached(repo_id, error, pushing)) from error
    except errors.EntryNotFoundError as error:
        # Its name for the Hub alone came with huggingface_hub 1.0.
        raise HubError(
            f"{repo_id}: it holds no such file; an erasure is called {DELTA_FILE}, pass filename "
            "for another"
        ) from error
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:
        raise HubError(_unreached(repo_id, error, pushing)) from error


def _unreached(repo_id: str, error: Any, pushing: bool) -> str:
    """What to do where the Hub refuses or can't be reached."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"{repo_id}: the Hub refused it ({status}): log in with an account that may "
            f"{'write to' if pushing else 'read'} it (hf auth login, or pass token)"
        )
    reason = str(error).strip().splitlines()
    told = f"{status}" if status else (reason[0][:200] if reason else type(error).__name__)
    if pushing:
        return (
            f"{repo_id}: the Hub can't be reached ({told}): save() needs no network; push the file "
            f"later, with realera-fast push {DELTA_FILE} {repo_id}"
        )
    return (
        f"{repo_id}: it is not in the cache, and the Hub can't be reached ({told}): where there "
        f"is a network, hf download {repo_id} fetches it; then copy the folder, and pass its path"
    )
