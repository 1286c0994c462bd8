"""Attention in groups of queries: the same numbers as at once, and groups only where a GPU has room for them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.training import attention
from t2sda_hf.training.attention import attend_in_groups, grouped, number_of_groups


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_outputs_and_gradients_are_those_of_all_queries_at_once(groups: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, count, 8, dtype=torch.float64) for count in (64, 6, 6)]
    weights = torch.randn(2, 64, 3, 8, dtype=torch.float64)
    found, expected = [], []
    for results, attend in ((found, grouped), (expected, sdpa_attention_forward)):
        query, key, value = (tensor.clone().requires_grad_() for tensor in given)
        last = groups if attend is grouped else None
        output, none = attend(torch.nn.Identity(), query, key, value, last, scaling=0.3, is_causal=False)  # type: ignore[operator]
        assert none is None
        (output * weights).sum().backward()
        results += [output, query.grad, key.grad, value.grad]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("maps", "queries", "keys", "processors", "groups"),
    [
        (2, 16384, 256, 132, 16),  # two crops of 512 at stride 4: 8 blocks, and 128 in 16 groups
        (4, 4096, 256, 132, 8),  # at stride 8, two heads
        (10, 1024, 256, 132, 1),  # at stride 16, five heads: twice 40 blocks are no four times
        (2, 65536, 1024, 132, 4),  # crops of 1024
        (2, 4096, 64, 132, 16),  # crops of 256: no group of fewer than 256 queries
        (2, 1024 * 15, 256, 132, 16),
        (2, 1023 * 16, 256, 132, 16),
        (2, 1023, 16, 132, 1),  # does not divide
        (2, 16384, 256, 16, 1),  # a small GPU is full
        (16, 1024, 1024, 132, 1),  # a ViT
    ],
)
def test_as_many_groups_as_fill_the_gpu(maps: int, queries: int, keys: int, processors: int, groups: int) -> None:
    assert number_of_groups(maps, queries, keys, processors) == groups


def network() -> T2SDAForSemanticSegmentation:
    torch.manual_seed(0)
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    return T2SDAForSemanticSegmentation(T2SDAConfig(**sizes, head="all_mlp", decoder_hidden_size=8, num_labels=3))


def test_a_network_that_attends_in_groups_computes_the_same() -> None:
    """As it would on a GPU: every attention that can be grouped is."""
    plain = network().eval()
    spread = deepcopy(plain)
    attend_in_groups(spread)
    images = torch.rand(2, 3, 64, 64)
    used: list[int] = []

    def everywhere(module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        groups = 4 if query.shape[2] % 4 == 0 else 1
        used.append(groups)
        return grouped(module, query, key, value, groups, **kwargs)

    assert torch.equal(plain(images).logits, spread(images).logits)  # on a CPU it is sdpa itself
    attention.AttentionInterface.register(attention.IN_GROUPS, everywhere)
    try:
        results = []
        for model in (plain, spread):
            logits = model(images).logits
            logits.square().sum().backward()
            results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    finally:
        attention.AttentionInterface.register(attention.IN_GROUPS, attention.sdpa_in_groups)
    assert 4 in used
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_saved_knows_nothing_of_it_and_a_choice_of_the_user_is_kept(tmp_path: Path) -> None:
    trained = network()
    attend_in_groups(trained)
    trained.save_pretrained(tmp_path)
    assert attention.IN_GROUPS not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert T2SDAForSemanticSegmentation.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    chosen = T2SDAForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation="eager")
    attend_in_groups(chosen)
    assert chosen.segformer.config._attn_implementation == "eager"
