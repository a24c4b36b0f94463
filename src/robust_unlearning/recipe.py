"""The typed recipe: YAML and `key=value` overrides in, a checked recipe or every error at once out.

Each default stands here and nowhere else. A field's paper symbol is in its description; `unlearn show RECIPE`
prints the whole recipe with its defaults filled in.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robust_unlearning import files
from robust_unlearning.errors import UserError, all_of, explain, nearest, unknown
from robust_unlearning.methods.losses import Direction
from robust_unlearning.methods.table import METHODS, Method, Preference, Representation, RetainLoss

Checked = TypeVar("Checked", bound=BaseModel)
Value = TypeVar("Value")
_OWN = "candidates trained in lockstep may differ here"
PerCandidate = Annotated[Value, _OWN]
"""The type of a field in which candidates that are trained in lockstep, over the same batches, may differ."""
_LATER = "no part of the content hash at its default: recipes and runs from before the field keep theirs"
Format = Literal["auto", "jsonl", "lines", "text", "parquet", "hub"]


class Strict(BaseModel):
    """A model that refuses unknown keys and never changes after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class TextSource(Strict):
    """Where a corpus lies and which of its documents are used. A plain string stands for `{path: …}`."""

    path: str = Field(description="a file, a folder laid out as the hub's, 'hub:ORG/NAME', or 'demo:FILE'")
    format: Format = Field("auto", description="auto goes by the file's ending")
    field: str = Field("text", description="the column or JSON key that holds the text")
    config: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    min_chars: int = Field(50, ge=0, description="shorter documents are left out")
    max_documents: int | None = Field(None, ge=1, description="use only the first so many")
    order: Literal["shuffle", "file"] = Field("shuffle", description="seeded shuffle each pass, or file order")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": os.fspath(value)} if isinstance(value, str | os.PathLike) else value


class Refusals(TextSource):
    """Where refusals lie: one a line, or JSON lines as TOFU's `idontknow.jsonl`. They may be short."""

    path: str = "shipped:refusals.jsonl"
    min_chars: int = Field(1, ge=0)


class Topic(Strict):
    """One thing to forget. What is left out here is taken from the recipe itself."""

    forget: TextSource
    retain: TextSource | None = None
    steering_scale: PerCandidate[float | None] = Field(None, gt=0)
    adaptive_scale: PerCandidate[float | None] = Field(None, gt=0)
    forget_weight: PerCandidate[float | None] = Field(None, ge=0)
    retain_weight: PerCandidate[float | None] = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=2)


class Recipe(Strict):
    """Everything that decides a run. Two runs of one recipe on one machine give the same delta to the bit."""

    method: PerCandidate[str] = Field(description="one of `unlearn list methods`")
    model: str = Field(description="hub id, folder, GGUF file, or a name of `unlearn list models`")
    topics: dict[str, Topic] = Field(min_length=1, description="what to forget; steps alternate between them")
    retain: TextSource | None = Field(None, description="retain corpus of every topic that names none")

    layer: int = Field(7, ge=0, description="l: the layer whose output the losses see, from 0")
    train_layers: tuple[int, ...] | None = Field(None, description="default: l-2, l-1, l")
    train_tensors: str = Field("mlp.down_proj", description="name pattern inside a layer, or 'all'")

    steering_scale: PerCandidate[float | None] = Field(None, gt=0, description="c of RMU and RSV")
    steering_unit: PerCandidate[Literal["absolute", "hidden_norm"]] = Field(
        "absolute", description="hidden_norm: c counts mean L2 norms of the reference's forget-tokens at l"
    )
    adaptive_scale: PerCandidate[float | None] = Field(None, gt=0, description="β of Adaptive RMU")
    coefficient: PerCandidate[Literal["per_sample", "first_batch"]] = Field(
        "per_sample", description="Adaptive RMU's norm: each sample's own, or kept from the first batch"
    )
    forget_weight: PerCandidate[float] = Field(1.0, ge=0, description="weight of the forget loss")
    retain_weight: PerCandidate[float] = Field(1200.0, ge=0, description="α: weight of the retain loss")
    retain_loss: PerCandidate[RetainLoss | None] = Field(
        None, description="on hidden states at l, or on log-probabilities; default: as the method is published"
    )
    kl: PerCandidate[Direction] = Field("reference_to_model", description="direction of retain_loss=kl")

    temperature: PerCandidate[float] = Field(0.1, gt=0, description="β of NPO, SimNPO and DPO")
    margin: PerCandidate[float] = Field(0.0, ge=0, description="γ of SimNPO")
    log_ratio: PerCandidate[Literal["sequence", "token_mean"]] = Field(
        "sequence", description="what NPO and DPO compare with the reference: sums or means over tokens"
    )
    refusals: Refusals = Field(Refusals(), description="what DPO prefers; drawn with the seed")
    refusal_after: Annotated[Literal["nothing", "forget_text"], _LATER] = Field(
        "nothing", description="what a refusal is conditioned on: it stands alone, or follows a forget sequence"
    )
    recompute_tail: PerCandidate[bool] = Field(False, description="less memory for the layers above l, more time")

    noise_std: PerCandidate[float | None] = Field(None, ge=0, description="√ν of RNA; 0 or nothing means no RNA")
    noise_variance: PerCandidate[float | None] = Field(None, ge=0, description="ν itself; give this or noise_std")
    noise_layers: PerCandidate[tuple[int, ...] | None] = Field(None, description="default: l")
    noise_site: PerCandidate[Literal["block", "mlp"]] = Field("block", description="residual stream, or MLP output")
    noise_seed: PerCandidate[int | None] = Field(None, ge=0, description="default: seed")

    steps: PerCandidate[int] = Field(500, ge=1, description="T: updates; topics take turns")
    batch_size: int = Field(4, ge=1, description="sequences of forget and of retain text a step")
    max_tokens: int = Field(512, ge=2, description="longer documents are cut")
    learning_rate: PerCandidate[float] = Field(5e-5, gt=0)
    weight_decay: PerCandidate[float] = Field(0.01, ge=0, description="of AdamW")
    seed: int = Field(0, ge=0, description="data order and steering vectors")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto is the checkpoint's. Trained tensors stay float32"
    )
    device: str = Field("auto", description="auto: cuda, else mps, else cpu")
    snapshots: PerCandidate[tuple[int, ...]] = Field((), description="steps after which the delta is kept too")
    log_every: PerCandidate[int] = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: PerCandidate[int] = Field(100, ge=1, description="steps between resumable checkpoints")
    allow_pickle: bool = Field(False, description="load pickled weights (they can run code)")
    trust_remote_code: bool = Field(False, description="run a model's own Python code")

    @property
    def spec(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def retain_kind(self) -> RetainLoss:
        """The retain loss: the recipe's own, or the method's."""
        return self.retain_loss or self.spec.retain_loss

    @property
    def title(self) -> str:
        """What tables call it: the method, with its retain loss where methods come with several (`NPO+KL`)."""
        short = {"kl": "+KL", "mse": "+MSE", "hidden_mse": "+hidden MSE" if isinstance(self.spec, Preference) else ""}
        return self.spec.title + short[self.retain_kind]

    @property
    def needs_tail(self) -> bool:
        """Whether a loss asks for log-probabilities, and so for the layers above l."""
        return isinstance(self.spec, Preference) or self.retain_kind != "hidden_mse"

    @property
    def band_layers(self) -> tuple[int, ...]:
        """Layers that hold trained tensors, ascending."""
        if self.train_layers is not None:
            return tuple(sorted(set(self.train_layers)))
        return tuple(range(max(0, self.layer - 2), self.layer + 1))

    @property
    def rna_std(self) -> float:
        """√ν; 0 when there is no RNA."""
        return (self.noise_std or 0.0) if self.noise_variance is None else math.sqrt(self.noise_variance)

    @property
    def rna_variance(self) -> float:
        """ν; 0 when there is no RNA."""
        return self.rna_std**2 if self.noise_variance is None else self.noise_variance

    @property
    def rna_seed(self) -> int:
        """The seed of RNA's noise."""
        return self.seed if self.noise_seed is None else self.noise_seed

    @property
    def noised_layers(self) -> tuple[int, ...]:
        """Layers of the reference that RNA perturbs."""
        return (self.layer,) if self.noise_layers is None else self.noise_layers

    @property
    def model_options(self) -> dict[str, bool]:
        """How the model may be loaded, as `models.checkpoint.resolve` takes it."""
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}

    def of_topic(self, topic: str, field: str) -> Any:
        """A field's value for a topic: the topic's own, else the recipe's."""
        value = getattr(self.topics[topic], field)
        return getattr(self, field) if value is None else value

    def as_yaml(self) -> str:
        """The whole recipe as YAML, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def content_hash(self) -> str:
        """SHA-256 of what the recipe says, independent of how its file was written (first 16 hex digits)."""
        fields = type(self).model_fields.items()
        later = {name for name, each in fields if _LATER in each.metadata and getattr(self, name) == each.default}
        text = json.dumps(self.model_dump(mode="json", exclude=later), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def shared_fields(recipe: Recipe) -> dict[str, str]:
    """What candidates in lockstep must agree on: field -> its value, as comparable text."""
    of_recipe, of_topics = (
        {name for name, field in model.model_fields.items() if _OWN in field.metadata} for model in (Recipe, Topic)
    )
    exclude: Any = {**dict.fromkeys(of_recipe, True), "topics": {"__all__": of_topics}}
    return {field: repr(value) for field, value in recipe.model_dump(mode="json", exclude=exclude).items()}


def _conflicts(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    """Combinations that cannot work, which no single field can see: the fields that take part, and the sentence."""
    known = recipe.method in METHODS
    if recipe.noise_std is not None and recipe.noise_variance is not None:
        given = f"noise_std ({recipe.noise_std}) and noise_variance ({recipe.noise_variance}) are both given"
        yield {"noise_std", "noise_variance"}, f"{given}; keep one (noise_std is the square root of noise_variance)."
    if not recipe.band_layers or not all(0 <= layer <= recipe.layer for layer in recipe.band_layers):
        named = f"train_layers: {list(recipe.train_layers or ())} must name layers from 0 to layer = {recipe.layer}"
        yield {"train_layers", "layer"}, f"{named}, at least one; the losses see nothing above that."
    highest = recipe.layer if known and recipe.retain_kind == "hidden_mse" else math.inf
    if not recipe.noised_layers or not all(0 <= layer <= highest for layer in recipe.noised_layers):
        yield (
            {"noise_layers", "layer"},
            (
                f"noise_layers: {list(recipe.noised_layers)} must name layers from 0 to layer = {recipe.layer}, at "
                "least one; the retain loss hidden_mse compares hidden states at that layer, so noise above it would "
                "change nothing (retain_loss=kl sees every layer)."
            ),
        )
    if late := [step for step in recipe.snapshots if not 1 <= step <= recipe.steps]:
        yield {"snapshots", "steps"}, f"snapshots: {late} outside 1 to steps = {recipe.steps}."
    if not known:
        yield {"method"}, "method: " + unknown("method", recipe.method, METHODS, "Run `unlearn list methods`.")
    scale = recipe.spec.scale_field if known and isinstance(recipe.spec, Representation) else None
    if known and recipe.steering_unit == "hidden_norm" and scale != "steering_scale":
        yield {"steering_unit", "method"}, f"steering_unit: {recipe.method} has no steering_scale; leave it out."
    for name, topic in recipe.topics.items():
        if scale and recipe.of_topic(name, scale) is None:
            yield {scale, "method"}, f"{scale}: {recipe.method} needs it; set {scale}=… or topics.{name}.{scale}=…."
        if topic.retain is None and recipe.retain is None:
            yield {"retain"}, f"topics.{name}.retain: no retain corpus; set retain=… for all or for this topic."


def wrong_changes(changes: Mapping[str, Any]) -> list[str]:
    """One sentence for each of these fields that no recipe has, or not with such a value, whatever the recipe."""
    dotted = {key.partition(".")[0] for key in changes if "." in key}
    lines = [unknown("field", each, Recipe.model_fields) for each in sorted(dotted - Recipe.model_fields.keys())]
    try:
        Recipe.model_validate({key: value for key, value in changes.items() if "." not in key})
    except ValidationError as error:
        lines += explain([wrong for wrong in error.errors() if wrong["type"] != "missing"], Recipe)
    return lines


def _without(data: dict[str, Any], error: ValidationError) -> Recipe | None:
    """The recipe without the fields that are wrong, so that conflicts among the others can be seen; None if none."""
    rest = copy.deepcopy(data)
    for detail in error.errors():
        here: Any = rest
        *parents, last = detail["loc"] or ("",)
        for part in parents:
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here.pop(last, None)
    try:
        return Recipe.model_validate(rest)
    except ValidationError:
        return None


def _check(data: dict[str, Any], source: str, errors: list[str]) -> Recipe:
    """Validate, gathering field errors and conflicts together, and raise them in one `UserError`."""
    wrong: set[str] = set()
    recipe: Recipe | None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        errors = errors + explain(error.errors(), Recipe)
        wrong = {str(part) for each in error.errors() for part in each["loc"]}
        recipe = _without(data, error)
    if recipe is not None:
        errors = errors + [text for fields, text in _conflicts(recipe) if not fields & wrong]
    if errors or recipe is None:
        raise all_of(errors, source)
    return recipe


def checked(
    kind: type[Checked],
    data: dict[str, Any],
    overrides: Iterable[str],
    source: str,
    known: Iterable[str] = (),
) -> Checked:
    """A model of any kind from a mapping with `key=value` overrides.

    Args:
        known: what has been found to be wrong already, for the same message.

    Raises:
        UserError: anything is wrong; every error is in the one message, which begins with `source`.
    """
    errors = [*known, *(line for text in overrides if (line := _override(data, text)))]
    try:
        made = kind.model_validate(data)
    except ValidationError as error:
        errors += explain(error.errors(), kind)
    if errors:
        raise all_of(errors, source)
    return made


def _override(data: dict[str, Any], text: str) -> str | None:
    """Apply one `dotted.key=value` to `data`; returns an error sentence, or None."""
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        return f"override {text!r}: write it as field=value, for example noise_std=0.03."
    try:
        parsed = yaml.safe_load(value) if value.strip() else None
    except yaml.YAMLError as error:
        return f"override {text!r}: the value is not YAML ({str(error).splitlines()[0]})."
    *parents, last = key.split(".")
    here = data
    for depth, part in enumerate(parents):
        inner = here.get(part)
        if isinstance(inner, str) and part in {"forget", "retain", "refusals"}:
            inner = {"path": inner}
        if inner is None:
            if depth == 1 and parents[0] == "topics" and here:
                return f"override {text!r}: " + unknown("topic", part, here)
            inner = {}
        if not isinstance(inner, dict):
            return f"override {text!r}: {'.'.join(parents[: depth + 1])!r} has no fields."
        here[part] = inner
        here = inner
    here[last] = parsed
    return None


def recipe_names() -> list[str]:
    """Names of the shipped recipes, as `unlearn list` prints them."""
    folder = files.package_dir() / "assets" / "recipes"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def recipe_path(name: str | os.PathLike[str]) -> Path:
    """The file of a shipped recipe or of the user's own.

    Raises:
        UserError: neither exists; the message names the nearest shipped recipe or file.
    """
    text = os.fspath(name)
    shipped = files.package_dir() / "assets" / "recipes" / f"{text}.yaml"
    if text in recipe_names():
        return shipped
    if text.endswith((".yaml", ".yml")) or Path(text).exists():
        return files.locate(text)
    close = nearest(text, recipe_names())
    hint = f" Did you mean {close!r}?" if close else ""
    raise UserError(f"no recipe {text!r}: it is neither a shipped recipe nor a file.{hint} Run `unlearn list recipes`.")


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A checked recipe from a shipped name, a YAML file or a mapping, with `key=value` overrides applied.

    Overrides split at the first `=`; dots reach into topics (`topics.biology.retain_weight=5`); values are
    YAML, so `false`, `0` and `null` override too.

    Raises:
        UserError: anything is wrong; every error is in the one message.
    """
    if isinstance(source, Mapping):
        data, name = json.loads(json.dumps(dict(source), default=str)), "recipe"
    else:
        path, name = recipe_path(source), str(source)
        data = files.read_yaml(path, "recipe")
        if not isinstance(data, dict):
            raise UserError(f"{path}: a recipe is a mapping of fields; see `unlearn show {recipe_names()[0]}`.")
    return _check(data, name, [line for text in overrides if (line := _override(data, text))])


def recipe_summary(name: str) -> str:
    """The first line of a shipped recipe's file, which says what it is."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
