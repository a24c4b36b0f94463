"""Finding input files and writing output files so that nothing is ever half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from robust_unlearning.errors import UserError, nearest, unknown

BUNDLED = {"demo:": "assets/demo", "reproduce:": "assets/reproduce/suites", "shipped:": "assets/texts"}
"""Prefixes of the names of files that the package ships, and the folders they lie in."""
BUILT: dict[str, Callable[[], Path]] = {}
"""Prefixes of the names of files that are built on first use, and what builds their folder where it is not there yet
and returns it. The package's `__init__` enters them, as a builder's room comes after this one."""
RECIPE, RECORDS, SCORES, ABOUT = "recipe.yaml", "records.jsonl", "scores.json", "evaluation.json"
"""Names of a run's recipe, and of an evaluation's answers (one line a question), scores and circumstances."""


def cache_dir() -> Path:
    """Where converted models and built files lie: $ROBUST_UNLEARNING_CACHE, else ~/.cache/robust-unlearning."""
    given = os.environ.get("ROBUST_UNLEARNING_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "robust-unlearning"


def package_dir() -> Path:
    """The folder of the installed package; every data file that is shipped lies in its `assets/`."""
    return Path(str(resources.files("robust_unlearning")))


def locate(path: str | os.PathLike[str]) -> Path:
    """The existing file or folder that `path` names; `demo:`, `reproduce:` and `shipped:NAME` come with the package.

    `planted:NAME` is of the planted world, which is built into the cache on first use.

    Raises:
        UserError: nothing is there; the message says where was looked and the nearest name beside it.
    """
    text = os.fspath(path)
    prefix = next((each for each in (*BUNDLED, *BUILT) if text.startswith(each)), None)
    if prefix:
        folder = BUILT[prefix]() if prefix in BUILT else package_dir() / BUNDLED[prefix]
        found = folder / text.removeprefix(prefix)
        if not found.exists():
            within = [each for each in folder.rglob("*") if each.suffix in {".jsonl", ".yaml", ".txt"}]
            names = [prefix + each.relative_to(folder).as_posix() for each in within]
            hint = f"If it was there before, remove {folder}: it is built again." if prefix in BUILT else ""
            raise UserError(unknown("bundled file", text, names, hint))
        return found
    found = Path(text).expanduser()
    if not found.exists():
        close = nearest_path(found)
        hint = f" Did you mean {str(close)!r}?" if close else ""
        where = f" (looked at {found.absolute()})" if not found.is_absolute() else ""
        raise UserError(f"no such file or folder: {text!r}{where}.{hint}")
    return found


def nearest_path(path: Path) -> Path | None:
    """What lies where `path` would, under a name close to its own; None when nothing is close.

    Suffixes are not compared, as two names with one suffix look alike by it: first come names with the suffix of
    `path`, then others, whose spelling must be closer. Where the folder itself is not there, one of a close name
    that holds the file is taken.
    """
    if not path.parent.is_dir():
        folder = nearest_path(path.parent) if path.parent != path else None
        return folder / path.name if folder and (folder / path.name).exists() else None
    stems: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for each in sorted(path.parent.iterdir()):
        stems[each.suffix != path.suffix].setdefault(each.stem, each)
    for among, alike in zip(stems, (0.66, 0.85), strict=True):
        if close := nearest(path.stem, among, alike):
            return among[close]
    return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `path` exists already.
    """
    if path.exists():
        raise UserError(f"{str(path)!r} exists already; name a new folder or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built by `build` into a temporary folder and moved into place at once, if not there already.

    One process at a time builds; the others wait and find it there.

    Raises:
        UserError: the folder that `target` is to lie in cannot be written to.
    """
    from filelock import FileLock

    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(target.with_name(f".{target.name}.lock")).acquire()
    except OSError as error:
        raise UserError(
            f"{target} cannot be built ({error}); name another folder in ROBUST_UNLEARNING_CACHE."
        ) from error
    with held:
        if not target.exists():
            with replacing_folder(target) as folder:
                build(folder)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, two spaces of indent, non-finite numbers refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON-lines file atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(locate(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}.") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Each line of a JSON-lines file that is not blank: its number, counted from 1, and its value.

    Raises:
        UserError: a line is not JSON.
    """
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}. Write one object a line.") from error


def read_yaml(path: Path, kind: str) -> Any:
    """Read a YAML file.

    Args:
        kind: what the file should be, for the message.

    Raises:
        UserError: the file is missing, a folder, or not YAML.
    """
    try:
        return yaml.safe_load(locate(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: a {kind} is a YAML file, and this is none: {line}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: a {kind} is a YAML file, and this is none: {error}") from error


def shipped(folder: str) -> dict[str, Path]:
    """The YAML files of a folder of the package, by their names."""
    return {path.stem: path for path in sorted((package_dir() / folder).glob("*.yaml"))}


def shipped_or_own(kind: str, name: str, folder: str, fields: str) -> dict[str, Any]:
    """What stands in a shipped file of this name, or in a user's YAML file.

    Args:
        kind: what is looked for, for the messages.
        folder: of the package, where the shipped ones lie.
        fields: the first that it has, for the message to one who gives another file.

    Raises:
        UserError: neither, not YAML, or no mapping.
    """
    known = shipped(folder)
    if name not in known and not name.endswith((".yaml", ".yml")):
        raise UserError(unknown(kind, name, known, "Or give a YAML file."))
    data = read_yaml(known.get(name) or Path(name), kind)
    if not isinstance(data, dict):
        raise UserError(f"{name}: a {kind} is a mapping with {fields}.")
    return data


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
