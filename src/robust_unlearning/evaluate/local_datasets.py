"""Data sets of lm-eval's tasks from local copies, laid out as on the hub.

A copy of the data set ORG/NAME is a folder DIR/ORG/NAME or DIR/NAME with what its repository holds: a README.md
that lists its configs, and their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robust_unlearning import files
from robust_unlearning.data.corpora import FILE_FORMATS, read_quietly
from robust_unlearning.errors import UserError, unknown
from robust_unlearning.perturb.lm_eval_tasks import LOCATION, TASKS

README = "README.md"


@contextmanager
def local_data(root: Path | None) -> Iterator[None]:
    """While it lasts, `datasets.load_dataset` takes data sets from under `root`; with None, from the hub as usual.

    A folder is read as it is now, also where `datasets` has read it before.
    Tasks of lm-eval load their data by that function when they are made. Their configs stay as they are, so a
    task is the same task wherever its data lies.

    Raises:
        UserError: `root` is no folder; within the block, a data set, or a config of it, that is not there.
    """
    import datasets

    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {str(root)!r} is no folder.")
    original, bars = datasets.load_dataset, datasets.are_progress_bars_disabled()
    caches: dict[Path, str] = {}

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in FILE_FORMATS:
            return original(path, name, **options)
        if Path(path).is_dir():  # a task that names a folder
            folder = Path(path)
        elif Path(path).is_absolute() and not Path(path).exists():
            raise UserError(
                f"a task has its data in the folder {path}, which is not there. If that is a perturbed set that was "
                f"moved: its {TASKS}/{LOCATION} names where it lies; write the new place there, as dataset_path."
            )
        elif root is None:
            return _from_hub(original, path, name, options)
        else:
            folder = find_copy(root, path)
        options.pop("revision", None)
        if folder not in caches:
            caches[folder] = _cache_of(folder)
        options["cache_dir"] = caches[folder]
        warnings: list[str] = []
        try:
            with read_quietly() as warnings:
                return original(str(folder), name, **options)
        except (OSError, ValueError) as error:
            configs = [] if isinstance(error, OSError) else datasets.get_dataset_config_names(str(folder))
            if name is None or name in configs or not configs:
                why = warnings[-1] if warnings else error
                raise UserError(f"{folder} cannot be read as the data set {path!r}: {why}") from error
            if not (folder / README).exists():
                raise UserError(
                    f"{folder} has no {README}, whose head lists the configs of {path}, so {name!r} is not known: put "
                    f"the hub repository's {README} beside its files."
                ) from error
            raise UserError(f"{folder}: {unknown(f'config of {path}', name, configs)}") from error

    datasets.load_dataset = load
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.load_dataset = original
        if not bars:
            datasets.enable_progress_bars()


def find_copy(root: Path, path: str) -> Path:
    """The folder under `root` that holds the data set `path` (ORG/NAME).

    Raises:
        UserError: there is none; the message says what was looked for and what is there.
    """
    if copy := next(filter(Path.is_dir, _places(root, path)), None):
        return copy
    folders = sorted(each for each in root.iterdir() if each.is_dir())
    above = root if root.name else root.absolute()
    for other in (above.parent.parent, above.parent, *folders):
        if any(map(Path.is_dir, _places(other, path))):
            hint = f"Did you mean --data-root {other}?"
            break
    else:
        hint = f"Put a copy of the hub's repository there: its {README} and its files."
    raise UserError(
        f"the data set {path!r} is not under --data-root {root}: looked for "
        f"{' and '.join(map(str, _places(root, path)))}; there is "
        f"{', '.join(each.name for each in folders) or 'no folder at all'}. {hint}"
    )


def _places(root: Path, path: str) -> list[Path]:
    """Where a copy of the data set `path` may lie under `root`."""
    return [root / path, root / path.rsplit("/", 1)[-1]]


def _cache_of(folder: Path) -> str:
    """Where `datasets` keeps what it makes of the files as they are now.

    In its own cache it finds a folder by its path and gives what the files held when they were first read.
    """
    digest = hashlib.sha256()
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        digest.update(f"{file.relative_to(folder)} {files.sha256_file(file)}\n".encode())
    return str(files.cache_dir() / "datasets" / digest.hexdigest()[:16])


def _from_hub(original: Any, path: str, name: str | None, options: dict[str, Any]) -> Any:
    try:
        return original(path, name, **options)
    except (OSError, ValueError) as error:
        config = f", config {name!r}" if name else ""
        raise UserError(
            f"the data set {path!r}{config} cannot be had from the hub: {error} If you have a copy, say where: "
            f"--data-root DIR, with the copy in DIR/{path}."
        ) from error
