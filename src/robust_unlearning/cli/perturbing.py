"""Perturbed question sets: perturb."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robust_unlearning.cli import AddVerb
from robust_unlearning.errors import UserError, unknown

STYLES = ("letters", "continuation")
OF_A_NEW_SET = ("keyword", "keywords", "where", "count", "option", "seed", "config", "split", "control", "style")
FOR_CONTROLS = ("control_from", "tokenizer")


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    perturb = verb("perturb", _perturb, "put keywords into a multiple-choice set; writes a data set and lm-eval tasks")
    perturb.add_argument("source", nargs="?", help="folder in hub layout (such as MMLU's), .jsonl, .csv or .parquet")
    perturb.add_argument("--to", required=True, type=Path, help="new folder; its name becomes the tasks' name")
    perturb.add_argument("--keyword", action="append", metavar="WORD", help="a word or phrase; may be given often")
    perturb.add_argument("--keywords", metavar="FILE", help="one a line, or JSON(L) of strings or {text: …}")
    perturb.add_argument(
        "--where", help="option (a wrong option replaced, the default), begin, end, parenthesis or sentence"
    )
    perturb.add_argument("--count", type=int, help="options to replace, or keywords put in (default: 1)")
    perturb.add_argument("--option", help="replace this one, by letter or index: C, or B,C (default: drawn)")
    perturb.add_argument("--seed", type=int, help="of all draws (default: 0)")
    perturb.add_argument("--config", help="one config of a folder in hub layout (default: all)")
    perturb.add_argument("--split", help="split of a folder in hub layout (default: test)")
    perturb.add_argument("--style", help="letters or continuation (default: tasks in both)")
    perturb.add_argument(
        "--control", action="store_true", default=None, help="a second set with harmless words in the keywords' places"
    )
    perturb.add_argument(
        "--control-from",
        metavar="CORPUS",
        help="text they come from (default: common words of the questions, and bundled nouns)",
    )
    perturb.add_argument("--tokenizer", metavar="MODEL", help="match their number of tokens too")
    perturb.add_argument("--from", dest="manifest", type=Path, help="rebuild the set of this manifest.json")


def _perturb(arguments: argparse.Namespace) -> None:
    from robust_unlearning.perturb.dataset import PerturbedSet, rebuild

    if arguments.manifest is not None:
        given = [name for name in (*OF_A_NEW_SET, *FOR_CONTROLS) if getattr(arguments, name) is not None]
        if given:
            raise UserError(f"--from takes everything from the manifest: leave --{given[0].replace('_', '-')} out.")
        made: PerturbedSet = rebuild(arguments.manifest, arguments.to, arguments.source)
    else:
        made = _made(arguments)
    print(_summary(made.manifest))
    if made.note:
        print(f"note: {made.note}")
    print(f"written to {arguments.to}: README.md, manifest.json, replaced.jsonl, tasks")
    print(
        f"next: lm_eval --model hf --model_args pretrained=MODEL --include_path {arguments.to / 'tasks'} "
        f"--tasks {','.join(made.groups)}"
    )


def _made(arguments: argparse.Namespace) -> Any:
    from robust_unlearning.perturb.dataset import Source, make_set
    from robust_unlearning.perturb.forms import perturbation
    from robust_unlearning.perturb.keywords import read_keywords

    if arguments.source is None:
        raise UserError("no questions given. Name a folder or a file: unlearn perturb mmlu/ --keyword WORD --to DIR")
    if arguments.style is not None and arguments.style not in STYLES:
        raise UserError(unknown("style of asking", arguments.style, STYLES))
    lonely = [name for name in FOR_CONTROLS if getattr(arguments, name) is not None]
    if lonely and not arguments.control:
        raise UserError(f"--{lonely[0].replace('_', '-')} is about controls: add --control.")
    settings = perturbation(
        arguments.where or "option",
        arguments.count,
        arguments.option,
        seed=arguments.seed or 0,
        control=bool(arguments.control),
        styles=(arguments.style,) if arguments.style else STYLES,
    )
    keywords = read_keywords(arguments.keyword or (), arguments.keywords)
    source = Source(path=arguments.source, config=arguments.config, split=arguments.split or "test")
    return make_set(
        source,
        keywords,
        settings,
        arguments.to,
        tokenizer=_tokenizer(arguments.tokenizer) if arguments.tokenizer else None,
        corpus=_corpus(arguments.control_from) if arguments.control_from else None,
        about_controls={
            "from": arguments.control_from or "the questions and the bundled nouns",
            "tokenizer": arguments.tokenizer,
        },
    )


def _tokenizer(name: str) -> Any:
    from robust_unlearning.models import checkpoint

    return checkpoint.load_tokenizer(checkpoint.resolve(name))


def _corpus(path: str) -> list[str]:
    from robust_unlearning.data.corpora import read_documents
    from robust_unlearning.recipe import TextSource

    return read_documents(TextSource.model_validate({"path": path, "min_chars": 1}))


def _summary(manifest: dict[str, Any]) -> str:
    """What was done, with the counts it rests on."""
    counts, settings = manifest["counts"], manifest["settings"]
    used = counts["keywords"]
    subjects = sum(1 for name in manifest["files"] if name.endswith(".parquet") and not name.startswith("control/"))
    lines = [
        f"{counts['perturbed']:,} of {counts['questions']:,} questions perturbed in {subjects} subjects; "
        f"{settings['where']}, {settings['count']} a question, {len(used)} of {len(manifest['keywords'])} keywords used"
    ]
    lines += [f"left out: {number:,} ({reason})" for reason, number in counts["left_out"].items()]
    for row in manifest["controls"].get("keywords", ())[:10]:
        near = ", ".join(f"{each['text']} ({_measures(each)})" for each in row["controls"][:3])
        lines.append(f"{len(row['controls'])} controls of {row['text']} ({_measures(row)}): {near}, …")
    if settings["control"]:
        words = manifest["controls"]["words_counted"]
        lines.append(f"× is how often in {words:,} words; all controls are in the manifest")
        if own := [row["text"] for row in manifest["controls"]["keywords"] if row.get("own_words")]:
            of = "one subject" if subjects == 1 else f"{subjects} subjects"
            lines.append(
                f"note: controls of {own[0]}{f' and {len(own) - 1} more keywords' if own[1:] else ''} had to be taken "
                f"from these questions of {of}, and may be of their topic: name another text, --control-from CORPUS"
            )
    return "\n".join(lines)


def _measures(row: dict[str, Any]) -> str:
    tokens = "" if row["tokens"] is None else f"{row['tokens']} tokens, "
    return f"{row['characters']} characters, {tokens}{row['count']}×"
