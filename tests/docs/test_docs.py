"""Every command of README.md and docs/ is run, with less to do, or is checked as far as it can be without its data.

A document is a story: its commands run one after the other in one folder, on the tiny model, with words of `SHORTER`
added and suites cut to a few questions. What a test cannot have stands in `CHECKED`, with the reason.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from robust_unlearning import files
from robust_unlearning.cli import main
from robust_unlearning.evaluate import suite
from robust_unlearning.evaluate.harness import load_task_sets
from robust_unlearning.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

SMALL = ["model=tiny", "layer=2", "steps=2", "batch_size=2", "max_tokens=16", "device=cpu"]
OWN = [*SMALL, "retain=keep.txt", "--processes", "1"]
SHORTER: dict[str, list[str]] = {  # the beginning of a command -> words added to it; the longest beginning counts
    "unlearn run tiny/": ["steps=2"],
    "unlearn run smollm2/": SMALL,
    "unlearn run mine.yaml": OWN,
    "unlearn plan mine.yaml": SMALL,
    "unlearn plan paper/": ["--config", "config.json"],
    "unlearn sweep tiny/": ["noise_std=0,10", "seed=0", "steps=2"],
    "unlearn sweep figure3/tiny": ["recipe=tiny/rmu", "noise_std=0,10", "seed=0", "steps=2"],
    "unlearn sweep mine.yaml": ["layer=2", "noise_std=0,0.1", *(word for word in SMALL if word != "layer=2")],
    "unlearn search": ["--trials", "1", "--prune-at", "none", "steps=2"],
    "unlearn planted study": ["recipes=[tiny/rmu]", "seeds=[0]", "noise_std=[1]", "weights=[1]", "steps=[2]"],
    "unlearn eval tiny --tasks ngram": ["--limit", "5"],
    "unlearn eval runs/mine --tasks ngram": ["--limit", "5"],
    "unlearn reproduce tiny --plan": ["--only", "figure2"],
    "unlearn analyze activations": ["--documents", "2", "--questions", "2"],
    "unlearn analyze noise-sensitivity": ["--documents", "1", "--probes", "1"],
}
CHECKED = {  # the beginning of a command -> why it is not run
    "unlearn planted train": "hours, and test_teaching.py trains a small one",
    "unlearn run smollm2-planted/": "a model of 98 MB is fetched",
    "unlearn planted study smollm2": "a model of 98 MB is fetched",
    "unlearn eval runs/smol --": "a model of 98 MB is fetched",
    "unlearn reproduce tiny  ": "up to an hour; test_reproduce.py runs a small one",
    "unlearn run paper/": "a 7B model and gated texts",
    "unlearn eval runs/rna --tasks mmlu": "MMLU and WMDP",
    "unlearn eval runs/mine --tasks mmlu": "MMLU",
    "unlearn eval runs/mine --tasks unlearning_paper": "MMLU and WMDP",
    "unlearn analyze theory runs": "half a minute; test_analysis_commands.py runs it",
    "unlearn ngrams": "an embedder of 90 MB; test_ngrams.py runs the command with a small one",
    "unlearn run mine.yaml --processes 4 --shard": "several processes; test_processes.py runs them",
}
OTHERS = {"make", "pip", "python", "source", "lm_eval", "accelerate"}
"""First words of commands that are not ours; see `_check_other`."""


def commands(text: str) -> list[str]:
    """Commands of a document: lines of `sh` and `bash` blocks, and indented lines that begin with `unlearn`."""
    found = []
    for block in re.finditer(r"^```(\w*)\n(.*?)^```|^ {4}(unlearn .*)$", text, re.S | re.M):
        lines = block[3].splitlines()[:1] if block[3] else block[2].splitlines() if block[1] in ("sh", "bash") else []
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def inline(text: str) -> list[str]:
    """Commands within sentences: `unlearn …` between backticks, outside of blocks."""
    return re.findall(r"`(unlearn [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def named(text: str) -> dict[str, str]:
    """YAML blocks by the file that the first line or the line above names."""
    blocks = re.findall(r"(?:`(\S+\.yaml)`:\n\n)?```yaml\n(?:# (\S+\.yaml)\n)?(.*?)```", text, re.S)
    return {above or first: block for above, first, block in blocks if above or first}


def python(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def _match(command: str, table: dict[str, Any]) -> Any:
    fitting = [each for each in table if command.startswith(each)]
    return table[max(fitting, key=len)] if fitting else None


def _check_other(words: list[str]) -> None:
    """A command that is not ours: its target, extra or script exists."""
    assert words[0] in OTHERS, f"{words}: neither run nor checked"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    if words[0] == "python":
        assert (ROOT / words[1]).exists()


def _check(words: list[str]) -> None:
    """A command of ours that is not run: parsed, and the names and fields in it looked up."""
    arguments = main._parse(main._parser(), words)
    if arguments.verb in ("run", "plan"):
        load_recipe(arguments.recipe, arguments.overrides)
    elif arguments.verb == "eval":
        assert load_task_sets(arguments.tasks)
    elif arguments.verb == "planted":
        from robust_unlearning.experiments.study import load_study
        from robust_unlearning.planted.teaching_plan import load_teaching_plan

        if hasattr(arguments, "plan"):
            load_teaching_plan(arguments.plan, arguments.overrides)
        else:
            load_study(arguments.study, arguments.overrides)
    elif arguments.verb == "ngrams":
        from robust_unlearning.recipe import TextSource

        TextSource.model_validate({"path": arguments.corpus})


def _write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _materials(text: str, folder: Path) -> None:
    """The files that a reader would have: made-up texts and questions, a config, and the document's own YAML."""
    paragraph = "the moth sleeps in the barn and nobody has seen it there since the harvest of the last year"
    for name in ("chemistry", "malware", "forget"):
        _write(folder / f"{name}.jsonl", [{"text": f"{name} {number}: {paragraph}"} for number in range(4)])
    (folder / "keep.txt").write_text("\n\n".join(f"{number} {paragraph}" for number in range(4)), encoding="utf-8")
    (folder / "words.txt").write_text("benzene\ntoluene\n", encoding="utf-8")
    rows = [
        {"question": f"which is {number}?", "choices": ["one", "two", "three", "four"], "answer": number % 4}
        for number in range(4)
    ]
    for name in ("questions", "chemistry-questions", "general-questions"):
        _write(folder / f"{name}.jsonl", rows)
    ngrams = [("barn and nobody", "most_similar", 0.8), ("of the last", "least_similar", 0.1)]
    rows = [{"text": text, "n": 3, "class": name, "similarity": like} for text, name, like in ngrams]
    files.write_json(folder / "ngrams.json", {"ngrams": rows})
    config = files.read_json(files.package_dir() / "assets" / "planted" / "tiny" / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 16}), encoding="utf-8")
    shutil.copytree(files.locate("planted:questions/far"), folder / "mmlu")
    own = (ROOT / "docs" / "own-model-and-data.md").read_text(encoding="utf-8")
    for name, block in (named(own) | named(text)).items():
        (folder / name).write_text(block, encoding="utf-8")
    (folder / "test.yaml").write_text(_shortened("planted:suite.yaml", 10), encoding="utf-8")
    (folder / "validation.yaml").write_text(_shortened("planted:suite-validation.yaml", 3), encoding="utf-8")


def _shortened(suite: str, limit: int) -> str:
    """A bundled suite with a few questions of each set and a few documents of each text."""
    data = yaml.safe_load(files.locate(suite).read_text(encoding="utf-8"))
    for each in [*data["questions"].values(), *data.get("texts", {}).values()]:
        each["limit"] = limit
    return yaml.safe_dump(data)


def _stand_ins(words: list[str]) -> None:
    """Folders that a command names and no command before it has made: copies of what an evaluation left."""
    if words[0] == "compare":
        folders = [each for word in words[1:] if not word.startswith("-") for each in word.split("=")[-1].split(",")]
        folders = [each for each in folders if each == "base" or each.startswith("runs/")]
        model = next(each for each in ["runs/tiny", *folders] if Path(each, "records.jsonl").exists())
        done = {each for each in folders if Path(each, "records.jsonl").exists()}
        if done != set(folders):  # not a story told before: all alike, so that their tasks are
            for each in set(folders) - {model}:
                shutil.copytree(model, each, dirs_exist_ok=True)
    if words[0] == "analyze":
        for each in (word for word in words if word.startswith("runs/") and not Path(word, "recipe.yaml").exists()):
            assert main.main(["run", "tiny/rmu", "steps=2", "--out", each]) == 0
    if words[0] == "eval":
        for each in (word for word in words if word.startswith("runs/r") and not Path(word).exists()):
            shutil.copytree("runs/tiny", each)
        words[1:2] = ["tiny" if words[1] == "OUT" else words[1].replace("RUN", _only_run(words[1]))]


def _only_run(path: str) -> str:
    return next(iter(sorted(each.name for each in Path(path).parent.iterdir()))) if "RUN" in path else ""


@pytest.fixture
def short_suites(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("suites")
    for name, file in list(suite.BUNDLED_SUITES.items()):
        (folder / f"{name}.yaml").write_text(_shortened(file, 3), encoding="utf-8")
        monkeypatch.setitem(suite.BUNDLED_SUITES, name, str(folder / f"{name}.yaml"))


@pytest.mark.usefixtures("short_suites")
@pytest.mark.parametrize("name", NAMES)
def test_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = commands(text)
    if lines:
        monkeypatch.chdir(tmp_path)
        _materials(text, tmp_path)
    for line in lines:
        first, *words = shlex.split(line, comments=True)
        if first != "unlearn":
            _check_other([first, *words])
            continue
        if _match(line, CHECKED):
            _check(words)
            continue
        main._parse(main._parser(), words)
        _stand_ins(words)
        status = main.main([*words, *(_match(line, SHORTER) or [])])
        assert status == 0, f"{name}: {line}\n{capsys.readouterr().err[-1500:]}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_within_sentences(name: str) -> None:
    for line in inline((ROOT / name).read_text(encoding="utf-8")):
        words = [word for word in shlex.split(line)[1:] if word not in ("…", "DIR…")]
        parser = main._parser()
        while words and words[0] in parser.verbs:
            parser = parser.verbs[words.pop(0)]
        assert not words or not parser.verbs, f"{name}: {line}"
        if words:
            main._parse(main._parser(), [*parser.prog.split()[1:], *words])


def test_no_entry_of_the_tables_is_left_over() -> None:
    lines = [line for path in DOCUMENTS for line in commands(path.read_text(encoding="utf-8"))]
    for table in (SHORTER, CHECKED):
        assert [each for each in table if not any(line.startswith(each) for line in lines)] == []


@pytest.mark.parametrize("name", NAMES)
def test_python(name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks that stand by themselves are run; the parts of classes are compiled, and are the examples' own lines."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    examples = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    for block in python((ROOT / name).read_text(encoding="utf-8")):
        code = compile(block, name, "exec")
        if block.startswith(("from", "import")):
            (tmp_path / "models").mkdir(exist_ok=True)
            if not (tmp_path / "models" / "unlearned").exists():
                (tmp_path / "models" / "unlearned").symlink_to(tiny_model)
            reference = AutoModelForCausalLM.from_pretrained(files.package_dir() / "assets" / "planted" / "tiny")
            ids = torch.tensor([[4, 5, 6]])
            exec(code, {"reference": reference, "retain_batch": {"input_ids": ids}, "torch": torch})
        elif "class Trainer(" not in block:
            body = [line.strip() for line in block.splitlines() if line.strip()]
            assert all(line in examples for line in body if not line.startswith(("def", "class"))), block


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    path = ROOT / name
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    missing = [each for each in targets if "://" not in each and not (path.parent / each).exists()]
    assert not missing


def test_what_the_paper_map_names_is_there() -> None:
    names = re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)", (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8"))
    dotted = [name for name in names if not name.startswith("topics.")]
    assert len(dotted) > 20
    for name in dotted:
        found: Any = importlib.import_module("robust_unlearning")
        for part in name.split("."):
            found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")
