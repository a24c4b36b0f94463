"""What one child process of the benchmark does: build one implementation, time its steps, note its memory.

torch and transformers are imported inside functions, so that `engine.py` stays small when it imports this.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from robust_unlearning.data.corpora import TokenBatch
    from robust_unlearning.recipe import Recipe
    from robust_unlearning.train.candidate import Candidate
    from robust_unlearning.train.engine import BandEngine
    from robust_unlearning.train.objective import BatchForward

RNA = "rna"
"""The implementation that alternates steps of ours with and without noise."""
FIRST = "first"
"""Ours as the first run of a model and data does it: reference log-probabilities are computed, not read."""
WARMUP = 3
"""Steps of each child that are not timed; their losses are kept, to show that all compute the same."""
TOPIC = "benchmark"


@dataclass(frozen=True)
class Shape:
    """A model without a checkpoint: its config, from which random weights are made on the device."""

    model_type: str
    config: dict[str, Any]
    tokens: int


SHAPES = {
    "zephyr-7b": Shape(
        "mistral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        },
        tokens=512,
    ),
    "tiny": Shape(  # to see the script work
        "mistral",
        {
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 4000,
            "sliding_window": 4096,
        },
        tokens=64,
    ),
}


@dataclass(frozen=True)
class Spec:
    """What one child process is to measure."""

    implementation: str
    method: str
    model: str
    shape: str | None
    layer: int
    steps: int
    batch: int
    tokens: int
    device: str
    noise_std: float


METHODS: dict[str, dict[str, Any]] = {
    "rmu": {"method": "rmu", "steering_scale": 6.5, "retain_weight": 1200},
    "npo-kl": {"method": "npo", "retain_loss": "kl", "temperature": 0.1, "retain_weight": 50},
}
"""The published weights; learning rate 5e-5."""


def make_recipe(spec: Spec, noise_std: float = 0.0) -> Recipe:
    """A method with its published weights on the demo's texts."""
    from robust_unlearning.recipe import load_recipe

    return load_recipe(
        {
            **METHODS[spec.method],
            "model": spec.shape or spec.model,
            "topics": {TOPIC: {"forget": "demo:forget.jsonl"}},
            "retain": "demo:retain.jsonl",
            "layer": spec.layer,
            "noise_std": noise_std,
            "steps": WARMUP + spec.steps,
            "batch_size": spec.batch,
            "max_tokens": spec.tokens,
            "device": spec.device,
        }
    )


def batch_source(spec: Spec, recipe: Recipe) -> Callable[[str, int], TokenBatch]:
    """A function from side and step to a batch: the demo's texts for a checkpoint, random ids for a shape."""
    import torch

    from robust_unlearning.data.corpora import Corpus, TokenBatch, read_documents
    from robust_unlearning.models import checkpoint

    if spec.shape is not None:
        vocabulary = SHAPES[spec.shape].config["vocab_size"]

        def random_ids(side: str, step: int) -> TokenBatch:
            generator = torch.Generator().manual_seed(2 * step + (side == "retain"))
            ids = torch.randint(0, vocabulary, (spec.batch, spec.tokens), generator=generator)
            return TokenBatch(ids, torch.ones_like(ids))

        return random_ids

    tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(recipe.model))
    sources = {"forget": recipe.topics[TOPIC].forget, "retain": recipe.retain}
    corpora = {
        side: Corpus(
            read_documents(source),
            tokenizer,
            max_tokens=recipe.max_tokens,
            batch_size=recipe.batch_size,
            order=source.order,
            seed=recipe.seed,
            name=f"{TOPIC}/{side}",
        )
        for side, source in sources.items()
        if source is not None
    }
    return lambda side, step: corpora[side].batch(step)


def random_model(auto: Any, shape: Shape, device: torch.device, depth: int | None = None) -> Any:
    """A bf16 model of a shape, made on the device; a weight depends on its name only, whatever the depth.

    Args:
        auto: `AutoModel` (no LM head) or `AutoModelForCausalLM`.
        shape: its config.
        device: where to make it.
        depth: number of layers, if not all.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        shape.model_type, **{**shape.config, **({} if depth is None else {"num_hidden_layers": depth})}
    )
    with device:
        model = auto.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # norms keep their ones
                seed = zlib.crc32(name.removeprefix(model.base_model_prefix + ".").encode())
                weight.normal_(0.0, 0.02, generator=torch.Generator(device).manual_seed(seed))
    return model.eval()


def load_ours(spec: Spec, recipes: Sequence[Recipe], device: torch.device) -> tuple[BandEngine, list[Candidate]]:
    """The library's engine and a candidate for each recipe; nothing is written to disk."""
    from transformers import AutoModel, AutoModelForCausalLM

    from robust_unlearning.models.layers import trained_tensors
    from robust_unlearning.parallel.processes import Processes
    from robust_unlearning.run.folder import RunFolder
    from robust_unlearning.train.candidate import Candidate
    from robust_unlearning.train.engine import BandEngine
    from robust_unlearning.train.trainer import Trainer

    runs = [RunFolder(Path(f"unused-{number}"), recipe) for number, recipe in enumerate(recipes)]
    if spec.shape is None:
        trainer = Trainer(runs)
        return trainer.engine, trainer.candidates
    recipe = recipes[0]
    tail = recipe.needs_tail
    auto, depth = (AutoModelForCausalLM, None) if tail else (AutoModel, recipe.layer + 1)
    model = random_model(auto, SHAPES[spec.shape], device, depth).requires_grad_(False)
    engine = BandEngine(model, min(recipe.band_layers), recipe.layer, tail=tail)
    trained = trained_tensors(engine.layers, recipe.band_layers, recipe.train_tensors)
    return engine, [Candidate(run, trained, engine.width, Processes(device)) for run in runs]


Step = Callable[["TokenBatch", "TokenBatch"], tuple[float, float]]
"""A forget and a retain batch, on the CPU, to the forget and the retain loss of one update on them."""


def asks_for_reference(recipe: Recipe) -> bool:
    """Whether the forget loss asks for reference log-probabilities."""
    return recipe.needs_tail and recipe.spec.needs_reference


def score(view: BatchForward) -> torch.Tensor:
    """Reference log-probabilities [b] of a batch's sequences."""
    import torch

    with torch.no_grad():
        return view.sequence_logp(view.final).logp


def score_all(engine: BandEngine, recipe: Recipe, batches: Sequence[TokenBatch]) -> dict[int, torch.Tensor]:
    """Reference log-probabilities by each batch's identity, as a later run finds them on disk."""
    from robust_unlearning.train.objective import BatchForward

    return {id(each): score(BatchForward(engine, each)) for each in batches} if asks_for_reference(recipe) else {}


def our_step(engine: BandEngine, candidate: Candidate, known: dict[int, torch.Tensor] | None) -> Step:
    """An update by the library.

    Args:
        known: reference log-probabilities by the forget batch's identity, as a run reads them from disk; None to
            score each batch within the step, as the first run does.
    """
    from robust_unlearning.train.objective import BatchForward
    from robust_unlearning.train.step import StepBatch, take_step

    def step(forget: TokenBatch, retain: TokenBatch) -> tuple[float, float]:
        view = BatchForward(engine, forget)
        if asks_for_reference(candidate.recipe):
            view.reference_logp = score(view) if known is None else known[id(forget)]
        losses = take_step(candidate, StepBatch(TOPIC, view, BatchForward(engine, retain)))
        return losses.forget.loss.item(), losses.retain.loss.item()

    return step


def two_model_step(spec: Spec, recipe: Recipe, device: torch.device) -> Step:
    """An update with two whole models."""
    from transformers import AutoModelForCausalLM
    from two_model import TwoModelNPO, TwoModelRMU

    from robust_unlearning.data.corpora import derived_seed
    from robust_unlearning.methods.table import draw_direction
    from robust_unlearning.models import checkpoint

    def load() -> Any:
        if spec.shape is not None:
            return random_model(AutoModelForCausalLM, SHAPES[spec.shape], device)
        base = checkpoint.resolve(recipe.model)
        where = base.repo or base.folder
        return AutoModelForCausalLM.from_pretrained(where, dtype="auto").to(device)

    trained, reference = load(), load()
    common: dict[str, Any] = {
        "train_layers": recipe.band_layers,
        "retain_weight": recipe.retain_weight,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "variant": "release" if spec.implementation == "release" else "frozen",
    }
    reference.requires_grad_(False)
    if recipe.method == "npo":
        training: Any = TwoModelNPO(trained, reference, temperature=recipe.temperature, **common)
    else:
        direction = draw_direction("uniform", trained.config.hidden_size, derived_seed(recipe.seed, "steering", TOPIC))
        own = {"layer": recipe.layer, "direction": direction.to(device), "scale": recipe.steering_scale}
        training = TwoModelRMU(trained, reference, **own, **common)

    def step(forget: TokenBatch, retain: TokenBatch) -> tuple[float, float]:
        forget, retain = forget.to(device), retain.to(device)
        return training.step(forget.ids, forget.mask, retain.ids, retain.mask)

    return step


def resident(field: str) -> int:
    """Bytes of resident memory: `VmRSS` now, or `VmHWM` at its peak; without /proc, the peak for both.

    `ru_maxrss` is the fallback only, since on Linux it counts the parent's memory before the exec too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(spec: Spec) -> dict[str, Any]:
    """Measure one implementation for `WARMUP` + `spec.steps` steps in this process."""
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM  # noqa: F401 (transformers imports lazily)

    memory = {"after_import": resident("VmRSS")}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from robust_unlearning.models.checkpoint import pick_device
    from robust_unlearning.run.folder import environment

    device = pick_device(spec.device)
    recipe = make_recipe(spec)
    torch.manual_seed(0)
    batch = batch_source(spec, recipe)
    batches = [(batch("forget", number), batch("retain", number)) for number in range(WARMUP + spec.steps)]
    if spec.implementation in ("ours", FIRST, RNA):
        recipes = [recipe, make_recipe(spec, spec.noise_std)] if spec.implementation == RNA else [recipe]
        engine, candidates = load_ours(spec, recipes, device)
        known = None if spec.implementation == FIRST else score_all(engine, recipe, [forget for forget, _ in batches])
        steps = [our_step(engine, candidate, known) for candidate in candidates]
    else:
        steps = [two_model_step(spec, recipe, device)]
    memory["after_load"] = resident("VmRSS")

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds: list[list[float]] = [[] for _ in steps]
    losses: list[list[tuple[float, float]]] = [[] for _ in steps]
    tokens = []
    for number, (forget, retain) in enumerate(batches):
        tokens.append(forget.tokens + retain.tokens)
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for index in order:  # with two candidates, each goes first every other time
            synchronise()
            began = time.perf_counter()
            loss = steps[index](forget, retain)
            synchronise()
            seconds[index].append(time.perf_counter() - began)
            losses[index].append(loss)
    memory["peak"] = resident("VmHWM")
    if device.type == "cuda":
        memory["gpu_peak"] = torch.cuda.max_memory_allocated()
    return {
        "implementation": spec.implementation,
        "seconds": [each[WARMUP:] for each in seconds],
        "tokens": tokens[WARMUP:],
        "warmup_seconds": [each[:WARMUP] for each in seconds],
        "first_losses": [each[:3] for each in losses],
        "memory": memory,
        "load_average": os.getloadavg()[0],
        "environment": environment(str(device)),
    }
