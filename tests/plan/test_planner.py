"""Plans of runs: bytes and FLOPs against hand-made numbers, against torch's counter and against real steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, random_model, save_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from robust_unlearning import files
from robust_unlearning.cli.main import main
from robust_unlearning.data.corpora import TokenBatch
from robust_unlearning.errors import UserError
from robust_unlearning.models import checkpoint
from robust_unlearning.models.layers import trained_tensors
from robust_unlearning.parallel.processes import Processes
from robust_unlearning.plan import rehearsal
from robust_unlearning.plan.lengths import batch_lengths, config_of
from robust_unlearning.plan.memory import Need, need
from robust_unlearning.plan.meter import Meter
from robust_unlearning.plan.plan import Change, Plan, changes, make_plan
from robust_unlearning.plan.text import format_fit, parse_bytes, size
from robust_unlearning.recipe import load_recipe, recipe_names
from robust_unlearning.run.folder import RunFolder
from robust_unlearning.train.candidate import Candidate
from robust_unlearning.train.engine import BandEngine
from robust_unlearning.train.objective import BatchForward
from robust_unlearning.train.step import StepBatch, take_step

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
WIDTH, INNER, KEYS = 32, 64, 16  # of the tests' Llama: d, the feed-forward block, keys and values
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER + 2 * WIDTH
DOWN = WIDTH * INNER

METHODS: dict[str, dict[str, Any]] = {
    "rmu": {},
    "rsv under RNA at the MLP": {"method": "rsv", "noise_std": 0.1, "noise_site": "mlp"},
    "npo+kl under RNA": {"method": "npo", "retain_loss": "kl", "noise_std": 0.1},
    "dpo+mse": {"method": "dpo", "retain_loss": "mse"},
    "rmu+kl, tail recomputed": {"retain_loss": "kl", "recompute_tail": True},
}


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with three layers, d = 32."""
    folder = tmp_path_factory.mktemp("short")
    random_model("llama", num_hidden_layers=3).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def short_recipe(tiny_recipe: dict[str, Any], short_model: Path) -> dict[str, Any]:
    """The tests' recipe on that model: band 0 to 1, a tail of one layer."""
    return tiny_recipe | {"model": str(short_model), "layer": 1}


def _plan(recipe: dict[str, Any], *overrides: str, **options: Any) -> Plan:
    return make_plan(load_recipe(recipe, overrides), process=0, **options)


def test_weights_and_optimiser_are_as_counted_by_hand(tiny_recipe: dict[str, Any]) -> None:
    plan = _plan(tiny_recipe, "dtype=bfloat16")
    assert plan.layers == (4, 6)
    assert plan.band == (1, 3)
    assert plan.trained == 3 * DOWN
    assert plan.read == {"embedding": VOCABULARY * WIDTH * 4, "trunk layers": LAYER * 4, "band layers": 3 * LAYER * 4}
    assert plan.again == 3 * DOWN * 4
    step = plan.memory["step"]
    assert step["weights: embedding"] == VOCABULARY * WIDTH * 2
    assert step["weights: trunk layers"] == LAYER * 2
    assert step["weights: band layers"] == 3 * LAYER * 2
    assert step["masters, float32"] == 3 * DOWN * 4
    assert step["AdamW moments, float32"] == 2 * 3 * DOWN * 4
    assert step["gradients, float32"] == 3 * DOWN * 4
    assert step["trained tensors, cast"] == 3 * DOWN * 2
    assert plan.memory["loading"]["tensors as stored"] == sum(plan.read.values())
    assert plan.memory["fingerprint"]["tensors as stored, one copied"] == 4 * DOWN * 4
    assert plan.disk == {
        "delta, in the checkpoint's type": 3 * DOWN * 4,
        "steering vectors": WIDTH * 4,
        "checkpoint, until the run ends": 3 * 3 * DOWN * 4,
    }


@pytest.mark.integration
def test_a_preference_method_reads_everything_and_keeps_references(short_recipe: dict[str, Any]) -> None:
    plan = _plan(short_recipe, "method=npo", "retain_loss=kl", "snapshots=[4]")
    assert plan.layers == (3, 3)
    assert plan.read["tail layers"] == LAYER * 4
    assert plan.read["LM head"] == VOCABULARY * WIDTH * 4
    assert plan.read["final norm"] == WIDTH * 4
    assert plan.again == sum(plan.read.values()) + 2 * DOWN * 4
    assert "trunk layers" not in plan.read
    assert "scoring forget" in plan.memory
    assert plan.disk["reference log-probabilities, in the cache"] % (8 * 8) == 0
    assert plan.disk["snapshots"] == plan.disk["delta, in the checkpoint's type"]
    assert plan.once.keys() == {"reference log-probabilities, forget"}


def test_points_share_trunk_and_reference(tiny_recipe: dict[str, Any]) -> None:
    one, three = _plan(tiny_recipe), _plan(tiny_recipe, points=3)
    for part in ("masters, float32", "AdamW moments, float32", "gradients, float32"):
        assert three.memory["step"][part] == 3 * one.memory["step"][part]
    assert three.memory["step"]["band, kept for backward"] == one.memory["step"]["band, kept for backward"]
    for part, times in {"trunk": 1, "reference": 1, "metrics": 1, "band": 3, "band backward": 3}.items():
        assert three.flops[part] == times * one.flops[part]


@pytest.mark.integration
def test_a_sweep_reckons_with_the_planners_phases(tiny_recipe: dict[str, Any]) -> None:
    plan = _plan(tiny_recipe, "topics.spells.forget=gone.jsonl")  # so that batches are as long as they may be
    reckoned = need([load_recipe(tiny_recipe)])
    assert reckoned.model == sum(size for part, size in plan.memory["step"].items() if part.startswith("weights: "))
    assert reckoned.model + reckoned.point + reckoned.step == max(
        sum(plan.memory[phase].values()) for phase in ("step", "optimiser")
    )
    more = [load_recipe(tiny_recipe, words) for words in (["noise_std=0.1"], ["method=npo", "retain_loss=kl"])]
    together = need([load_recipe(tiny_recipe), *more])
    assert together == Need(*(max(pair) for pair in zip(*(astuple(need([each])) for each in more), strict=True)))


class _Whole:
    """For torch's counter: everything belongs to the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_error: object) -> None: ...


@pytest.mark.integration
@pytest.mark.parametrize("changed", METHODS.values(), ids=METHODS)
def test_flops_and_live_bytes_are_those_of_a_real_update(short_recipe: dict[str, Any], changed: dict[str, Any]) -> None:
    """FLOPs to the last one, by torch's counter; the peak to 3 %: one token less of each batch is predicted."""
    recipe = load_recipe(short_recipe | changed)
    widths = {"forget": 24, "retain": 20} | ({"refusals": 9} if recipe.method == "dpo" else {})
    base = checkpoint.resolve(recipe.model)
    with rehearsal.without_data("tiny"):
        planned = rehearsal.rehearse_step(rehearsal.prepare(recipe, base), widths)

    cpu = torch.device("cpu")
    if recipe.needs_tail:
        model = checkpoint.load_causal_lm(base, "auto", cpu)
    else:
        model = checkpoint.load_truncated(base, recipe.layer + 1, "auto", cpu)
    engine = BandEngine(model, 0, recipe.layer, tail=recipe.needs_tail)
    trained = trained_tensors(engine.layers, recipe.band_layers, recipe.train_tensors)
    candidate = Candidate(RunFolder(Path(), recipe), trained, engine.width, Processes(cpu))

    def views(padding: int) -> list[BatchForward]:
        found = []
        for width in widths.values():
            mask = torch.ones(recipe.batch_size, width, dtype=torch.long)
            mask[0, width - padding :] = 0
            found.append(BatchForward(engine, TokenBatch(torch.ones_like(mask), mask), torch.zeros(recipe.batch_size)))
        return found

    attention = {  # 2 products forward, 5 backward, of b sequences, h heads, t × t tokens, d a head
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_, **__: 4 * _pairs(q),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _g, q, *_, **__: 10 * _pairs(q),
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    counter.mod_tracker = _Whole()  # its own cannot follow a gradient taken inside a forward pass
    with counter:
        take_step(candidate, StepBatch("spells", *views(padding=0)))
    flops = {part: each.linear + each.attention for part, each in planned.flops.items() if part[1] != "metrics"}
    assert sum(flops.values()) == counter.get_total_flops()

    with Meter() as meter:  # padding, since without any there is no mask
        take_step(candidate, StepBatch("spells", *views(padding=1)))
    rehearsed = sum(size for part, size in planned.peak.items() if part[1] != "gradients")
    assert rehearsed == pytest.approx(sum(meter.peak.values()), rel=0.03)


def _pairs(shape: torch.Size) -> int:
    batch, heads, tokens, width = shape
    return batch * heads * tokens * tokens * width


def test_a_trunk_layer_costs_two_flops_a_weight_and_token(tiny_recipe: dict[str, Any]) -> None:
    recipe = load_recipe(tiny_recipe)
    with rehearsal.without_data("tiny"):
        stage = rehearsal.prepare(recipe, checkpoint.resolve(recipe.model))
        flops = rehearsal.rehearse_step(stage, {"forget": 24, "retain": 24}).flops["forget", "trunk"]
    tokens = recipe.batch_size * 24
    assert flops.linear == 2 * (LAYER - 2 * WIDTH) * tokens  # its norms are no products
    assert flops.attention == 4 * tokens * 24 * WIDTH


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "width", "inner", "layers", "heads"),
    [("llama-3-70b", 8192, 28672, 80, 64), ("llama-3.1-405b", 16384, 53248, 126, 128)],
)
def test_large_models_are_planned_from_their_config(name: str, width: int, inner: int, layers: int, heads: int) -> None:
    recipe = load_recipe("paper/zephyr-7b-rmu", ["device=cuda", "max_tokens=512"])
    plan = make_plan(recipe, config=CONFIGS / f"{name}.json", process=0)
    one = 2 * width * width + 2 * width * 8 * (width // heads) + 3 * width * inner + 2 * width
    assert plan.layers == (8, layers)
    assert plan.read == {"embedding": 128256 * width * 2, "trunk layers": 5 * one * 2, "band layers": 3 * one * 2}
    assert plan.memory["step"]["masters, float32"] == 3 * width * inner * 4
    assert plan.host["loading"]["weights: band layers"] == 3 * one * 2
    assert "fingerprint" not in plan.memory


@pytest.mark.integration
@pytest.mark.parametrize("name", [each for each in recipe_names() if each.startswith("tiny/")])
def test_shipped_recipes_can_be_planned(name: str, short_model: Path) -> None:
    """On three layers of another model, so that it is quick."""
    plan = make_plan(load_recipe(name, ["steps=4", "layer=1"]), config=short_model, process=0)
    assert plan.peak > sum(plan.read.values())
    assert plan.lengths_from.endswith("from the corpora")
    json.dumps(plan.as_dict(), allow_nan=False)


@pytest.mark.integration
def test_lengths_are_those_of_the_batches(tiny_recipe: dict[str, Any]) -> None:
    from robust_unlearning.train.trainer import Trainer

    recipe = load_recipe(tiny_recipe)
    lengths, source = batch_lengths(recipe, checkpoint.resolve(recipe.model))
    trainer = Trainer([RunFolder(Path(), recipe)])
    batches = [trainer.batches(step)[1].batch for step in range(recipe.steps)]
    widths = [each.ids.shape[1] for each in batches]
    assert source.endswith("from the corpora")
    assert lengths["forget"].widest == max(widths)
    assert lengths["forget"].width == pytest.approx(sum(widths) / len(widths))
    predicted = [each.tokens - len(each.ids) for each in batches]
    assert lengths["forget"].predicted == pytest.approx(sum(predicted) / len(predicted))
    flops = make_plan(recipe, process=0).flops["trunk"]
    most = make_plan(load_recipe(tiny_recipe, ["topics.spells.forget=gone.jsonl"]), process=0)
    assert "gone.jsonl is not here" in most.lengths_from
    assert most.lengths["forget"].widest == most.lengths["forget"].width == 24
    assert most.flops["trunk"] > flops


@pytest.mark.integration
def test_a_folder_with_a_config_alone_is_enough(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(Path(tiny_recipe["model"]) / "config.json", tmp_path)
    plan = _plan(tiny_recipe | {"model": str(tmp_path)})
    assert plan.read == _plan(tiny_recipe).read
    assert "an upper bound (" in plan.lengths_from  # no tokenizer there


def test_code_of_a_model_s_own_is_not_run(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", {"model_type": "llama", "auto_map": {"AutoModel": "own.Model"}})
    with pytest.raises(UserError, match="trust_remote_code=true"):
        config_of(load_recipe(tiny_recipe), tmp_path)


def test_a_forward_pass_that_depends_on_values_has_no_plan(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x if x.sum() > 0 else -x))
    with pytest.raises(UserError, match="its forward depends on values"):
        _plan(tiny_recipe)


def test_layers_and_tensors_that_are_not_there(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="layers 0 to 5"):
        _plan(tiny_recipe, "layer=9")
    with pytest.raises(UserError, match=r"did you mean 'mlp.down_proj'"):
        _plan(tiny_recipe, "train_tensors=mlp.down_prj")


@pytest.mark.integration
def test_changes_that_make_a_run_smaller(short_recipe: dict[str, Any]) -> None:
    recipe = load_recipe(short_recipe, ["method=npo", "retain_loss=kl", "batch_size=1", "train_layers=[1]"])
    plan = make_plan(recipe, process=0, points=2)
    ways = {way.text: way.peak for way in changes(recipe, plan)}
    together = "--points 1 dtype=bfloat16 recompute_tail=true"
    assert min(ways, key=lambda text: ways[text] if not text.startswith("method") else plan.peak) == together
    assert ways["recompute_tail=true"] < plan.peak
    assert any(text.startswith("method=rmu") for text in ways)


def test_whether_it_fits(tiny_recipe: dict[str, Any]) -> None:
    plan = _plan(tiny_recipe)
    assert format_fit(plan, plan.peak, []).startswith("fits: ")
    said = format_fit(plan, plan.peak - 1, [Change("batch_size=1", plan.peak - 1), Change("larger", plan.peak + 1)])
    assert said.startswith("does not fit: ")
    assert "fits  batch_size=1" in said
    assert "larger" not in said


@pytest.mark.parametrize(("text", "count"), [("80GiB", 80 * 2**30), ("24 gb", 24 * 10**9), ("1.5k", 1500), ("7", 7)])
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "1.2.3GB", "80 parsecs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="80GiB"):
        parse_bytes(text)


@pytest.mark.integration
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "tiny/rmu", "steps=4", "max_tokens=16", "--flops", "1e12", "--memory", "100GiB"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "of 8, the others are never read" in said
    assert "computing at 1 TFLOP/s sustained" in said
    assert "\nfits: " in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["peak_bytes"] == sum(found["memory"][found["peak_phase"]].values())
    assert found["seconds"]["steps"] == pytest.approx(4 * sum(found["flops"].values()) / 1e12)
    assert found["memory"]["step"]["Python, libraries, tokenizer, texts"] > 2**20
    assert main(["plan", "tiny/rmu", "--points", "0"]) == 2
    assert "above 0" in capsys.readouterr().err


def test_sizes_are_written() -> None:
    assert [size(each) for each in (5, 1536, 3 * 2**40)] == ["5 B", "1.5 KiB", "3.00 TiB"]


@pytest.mark.integration
def test_a_model_that_is_not_here_can_be_planned_by_its_config(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "paper/zephyr-7b-rmu"]) == 2
    assert "--config FILE" in capsys.readouterr().err
    assert main(["plan", "smollm2/rmu", "model=no/where", "layer=3", "--config", str(tiny_model)]) == 0
