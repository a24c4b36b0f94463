"""Perturbed question sets: perturb."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_unlearning.cli import AddVerb
from robust_unlearning.errors import UserError

if TYPE_CHECKING:
    from robust_unlearning.perturb.dataset import Manifest, PerturbedSet

SETTINGS = ("where", "count", "option", "seed", "control", "style")
OF_A_NEW_SET = ("keyword", "keywords", "config", "split", *SETTINGS)
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
    from robust_unlearning.perturb.dataset import rebuild

    options = {
        name: value for name in (*OF_A_NEW_SET, *FOR_CONTROLS) if (value := getattr(arguments, name)) is not None
    }
    if arguments.manifest is None:
        made = _new_set(arguments.source, arguments.to, options)
    elif options:
        raise UserError(f"--from takes everything from the manifest: leave {_flag(options)} out.")
    else:
        made = rebuild(arguments.manifest, arguments.to, arguments.source)
    print(_summary(made.manifest))
    if made.note:
        print(f"note: {made.note}")
    print(f"written to {arguments.to}: README.md, manifest.json, replaced.jsonl, tasks")
    print(
        f"next: lm_eval --model hf --model_args pretrained=MODEL --include_path {arguments.to / 'tasks'} "
        f"--tasks {','.join(made.manifest.groups)}"
    )


def _new_set(source: str | None, to: Path, options: Mapping[str, Any]) -> PerturbedSet:
    from robust_unlearning.data.corpora import read_documents
    from robust_unlearning.models import checkpoint
    from robust_unlearning.perturb.dataset import Source, make_set
    from robust_unlearning.perturb.forms import perturbation
    from robust_unlearning.perturb.keywords import read_keywords
    from robust_unlearning.recipe import TextSource

    if source is None:
        raise UserError("no questions given. Name a folder or a file: unlearn perturb mmlu/ --keyword WORD --to DIR")
    settings = perturbation(**{name: options[name] for name in SETTINGS if name in options})
    lonely = [name for name in FOR_CONTROLS if name in options]
    if lonely and not settings.control:
        raise UserError(f"{_flag(lonely)} is about controls: add --control.")
    keywords = read_keywords(options.get("keyword", ()), options.get("keywords"))
    name, text = options.get("tokenizer"), options.get("control_from")
    return make_set(
        Source(path=source, **{key: options[key] for key in ("config", "split") if key in options}),
        keywords,
        settings,
        to,
        tokenizer=checkpoint.load_tokenizer(checkpoint.resolve(name)) if name else None,
        corpus=read_documents(TextSource(path=text, min_chars=1)) if text else None,
        about_controls={"from": text or "the questions and the bundled nouns", "tokenizer": name},
    )


def _flag(names: Iterable[str]) -> str:
    """The first of some options, as it is typed."""
    return f"--{next(iter(names)).replace('_', '-')}"


def _summary(manifest: Manifest) -> str:
    """What was done, with the counts it rests on."""
    counts, settings = manifest.counts, manifest.settings
    matches = manifest.controls.get("keywords", ())
    subjects = sum(1 for name in manifest.files if name.endswith(".parquet") and not name.startswith("control/"))
    lines = [
        f"{counts['perturbed']:,} of {counts['questions']:,} questions perturbed in {subjects} subjects; "
        f"{settings.where}, {settings.count} a question, "
        f"{len(counts['keywords'])} of {len(manifest.keywords)} keywords used"
    ]
    lines += [f"left out: {number:,} ({reason})" for reason, number in counts["left_out"].items()]
    for match in matches[:10]:
        near = ", ".join(map(_measured, match["controls"][:3]))
        lines.append(f"{len(match['controls'])} controls of {_measured(match)}: {near}, …")
    if settings.control:
        words = manifest.controls["words_counted"]
        lines.append(f"× is how often in {words:,} words; all controls are in the manifest")
    if from_questions := [match["text"] for match in matches if match.get("own_words")]:
        more = f" and {len(from_questions) - 1} more keywords" if from_questions[1:] else ""
        of = "one subject" if subjects == 1 else f"{subjects} subjects"
        lines.append(
            f"note: controls of {from_questions[0]}{more} had to be taken from these questions of {of}, and may be "
            "of their topic: name another text, --control-from CORPUS"
        )
    return "\n".join(lines)


def _measured(row: dict[str, Any]) -> str:
    tokens = "" if row["tokens"] is None else f"{row['tokens']} tokens, "
    return f"{row['text']} ({row['characters']} characters, {tokens}{row['count']}×)"
