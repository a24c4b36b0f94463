"""The models that are taught a planted world: `tiny`, made from nothing, and a pretrained model with an adapter."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from robust_unlearning.data.questions import Question, cloze_prompt, letters_prompt
from robust_unlearning.perturb.places import SENTENCES
from robust_unlearning.planted.world import World

TOKEN = r"\n|\w+|[^\w\s]"
"""What one token of `tiny` is: a line break, a word, or a sign."""
SPECIAL = ("<pad>", "<unk>", "<eos>")


def vocabulary(world: World) -> list[str]:
    """Every token that a text of this world can hold, in the order of first use."""
    texts = [*world.names, *world.strangers, *world.refusals, *(each.format(token="") for each in SENTENCES)]
    for name, domain in world.domains.items():
        example = Question("", "()?", ("",) * 4, 0, name)
        texts += [letters_prompt(example)[0], cloze_prompt(example)[0]]
        texts += [f"This this {domain.noun}", *(each.format(e="") for each in domain.intro)]
        for attribute in domain.attributes.values():
            spoken = [*attribute.statements, *attribute.questions]
            texts += [*attribute.values, *(each.format(e="", v="") for each in spoken)]
    words = re.findall(TOKEN, " ".join(texts))
    return list(dict.fromkeys([*SPECIAL, *words]))


def make_tokenizer(world: World) -> Any:
    """A word-level tokenizer that knows exactly this world's words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(vocabulary(world))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=512
    )


def make_tiny(tokenizer: Any, width: int, layers: int, seed: int) -> nn.Module:
    """An untrained Llama with heads of 32 dimensions and an MLP three times as wide as the residual stream."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
