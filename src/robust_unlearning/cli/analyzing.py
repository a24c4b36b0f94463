"""The paper's claims on models of one's own: analyze noise-sensitivity, theory, activations, harmfulness."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_unlearning.cli import AddVerb, positive, unsafe_options
from robust_unlearning.errors import UserError

if TYPE_CHECKING:
    from robust_unlearning.analyze.output import Report
    from robust_unlearning.analyze.variants import Variants

TARGETS = "run folders, delta files or the base itself, all of one base"


def add(verb: AddVerb) -> None:
    """Register the verbs."""
    analyze = verb("analyze", _theory, "measure the paper's claims on a base and its unlearned models")
    inner = analyze.add_subparsers(title="what to analyse", required=True, metavar="WHAT")

    def kind(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = inner.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        return added

    noise = kind("noise-sensitivity", _noise_sensitivity, "how much noise at a layer's input shows behind it (Eq. 33)")
    _models(noise, "+")
    noise.add_argument("--texts", help="documents (default: the forget texts of the first run)")
    noise.add_argument("--layer", default="all", help="one layer, or all (default)")
    noise.add_argument("--probes", type=positive, default=4, metavar="K", help="draws a document (default: 4)")
    noise.add_argument("--noise-std", type=_above_zero, default=1.0, help="of the noise ξ (default: the paper's 1)")
    _sizes(noise, documents=16)

    theory = kind("theory", _theory, "Assumption 4.1, Theorems 4.2 and 5.2, Eq. 5 to 9; without targets: 5.2 alone")
    _models(theory, "*")
    theory.add_argument("--tasks", help="'planted', 'demo' or a suite's YAML file: the questions")
    theory.add_argument("--texts", help="forget text (default: the forget texts of the first run)")
    theory.add_argument("--layer", type=int, help="where noise is put (default: the runs' own layer)")
    theory.add_argument("--draws", type=positive, default=32, help="of the noise for Theorem 4.2 (default: 32)")
    theory.add_argument("--probes", type=positive, default=4, help="of the Hessian, a document (default: 4)")
    _sizes(theory, documents=12, questions=32)

    activations = kind("activations", _activations, "hidden states of texts, and of questions with a forget-token")
    _models(activations, "+")
    activations.add_argument("--tasks", required=True, help="'planted', 'demo' or a suite's YAML file: the questions")
    _sizes(activations, documents=32, questions=64)

    harm = kind(
        "harmfulness", _harmfulness, "accuracy and excess harm by class of forget n-grams (Figure 4), or by length"
    )
    harm.add_argument("folders", nargs="+", metavar="LABEL=FOLDER", help="folders with records.jsonl of `unlearn eval`")
    harm.add_argument("--classes", required=True, help="the JSON file that `unlearn ngrams` wrote")
    harm.add_argument("--out", type=Path, default=Path(), help="results go to OUT/analysis (default: here)")


def _models(to: argparse.ArgumentParser, count: str) -> None:
    to.add_argument("targets", nargs=count, metavar="TARGET", help=TARGETS)
    to.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    to.add_argument("--out", type=Path, default=Path(), help="results go to OUT/analysis (default: here)")
    to.add_argument("--seed", type=int, default=0, help="of every draw")
    unsafe_options(to)


def _sizes(to: argparse.ArgumentParser, documents: int, questions: int | None = None) -> None:
    to.add_argument("--documents", type=positive, default=documents, help=f"how many (default: {documents})")
    to.add_argument("--max-tokens", type=positive, default=128, help="of a document (default: 128)")
    if questions:
        text = f"of each question set (default: {questions})"
        to.add_argument("--questions", type=positive, default=questions, help=text)


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _variants(arguments: argparse.Namespace) -> Variants:
    from robust_unlearning.analyze.variants import Variants

    options = {"allow_pickle": arguments.allow_pickle, "trust_remote_code": arguments.trust_remote_code}
    return Variants(arguments.targets, arguments.device, **options)


def _forget_rows(variants: Variants, arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """The documents of --texts, or the forget texts of the first run."""
    from robust_unlearning.analyze import inputs

    if not arguments.texts:
        return variants.documents("forget", arguments.documents, arguments.max_tokens)
    texts = inputs.text_file(arguments.texts, arguments.documents)
    return inputs.rows(variants.tokenizer, texts, arguments.max_tokens)


def _tick(name: str) -> None:
    print(f"measuring {name}", file=sys.stderr, flush=True)


def _print(report: Report, out: Path) -> None:
    from robust_unlearning.analyze.output import write

    print(write(report, out))


def _noise_sensitivity(arguments: argparse.Namespace) -> None:
    from robust_unlearning.analyze.noise_sensitivity import ProbeSettings, analyse
    from robust_unlearning.models.layers import check_layers

    variants = _variants(arguments)
    layers = None
    if arguments.layer != "all":
        if not arguments.layer.isdecimal():
            raise UserError(f"--layer {arguments.layer!r}: give the number of a layer, or 'all'.")
        layers = [int(arguments.layer)]
        check_layers(layers, variants.depth, "--layer")
    settings = ProbeSettings(layers, arguments.probes, arguments.noise_std, arguments.seed)
    _print(analyse(variants, _forget_rows(variants, arguments), settings, _tick), arguments.out)


def _theory(arguments: argparse.Namespace) -> None:
    from robust_unlearning.reproduce.theory.report import analyse, closed_form_report

    if not arguments.targets:
        _print(closed_form_report(), arguments.out)
        return
    if not arguments.tasks:
        raise UserError("theory on models needs questions: --tasks planted, --tasks demo, or a suite's YAML file.")

    from robust_unlearning.analyze import inputs
    from robust_unlearning.evaluate.suite import load_suite
    from robust_unlearning.reproduce.theory.measure import TheorySettings

    suite, variants = load_suite(arguments.tasks), _variants(arguments)
    settings = TheorySettings(
        variants.layer(arguments.layer), draws=arguments.draws, probes=arguments.probes, seed=arguments.seed
    )
    questions = inputs.prompts(inputs.harmless(suite), variants.tokenizer, arguments.questions)
    documents = _forget_rows(variants, arguments)
    report = analyse(variants, questions, documents, settings, _tick, {"tasks": arguments.tasks})
    _print(report, arguments.out)


def _activations(arguments: argparse.Namespace) -> None:
    from robust_unlearning.analyze import inputs
    from robust_unlearning.analyze.activations import analyse
    from robust_unlearning.evaluate.suite import load_suite

    suite, variants = load_suite(arguments.tasks), _variants(arguments)
    sizes = (arguments.documents, arguments.max_tokens)
    texts = {side: variants.documents(side, *sizes) for side in ("forget", "retain")}
    questions = inputs.prompts(inputs.harmless(suite), variants.tokenizer, arguments.questions)
    _print(analyse(variants, texts, questions, _tick), arguments.out)


def _harmfulness(arguments: argparse.Namespace) -> None:
    from robust_unlearning.analyze.harmfulness import analyse, read_folder
    from robust_unlearning.analyze.ngram_answers import read_classes

    classes = read_classes(arguments.classes)
    records = {}
    for word in arguments.folders:
        label, equals, folder = word.partition("=")
        label, folder = (label, folder) if equals else (Path(word).name, word)
        if label in records:
            raise UserError(f"the label {label!r} is given twice; write LABEL=FOLDER with other labels.")
        records[label] = read_folder(folder)
    _print(analyse(records, classes), arguments.out)
