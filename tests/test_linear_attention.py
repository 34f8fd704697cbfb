"""Linear-attention layers in packed rows, against the layer's own forward on each sequence alone.

The recurrence is float32 inside, whatever the dtype of the model, so sums in another order differ by about 1e-6.
"""

from __future__ import annotations

import copy

import family_checkpoints
import numpy as np
import pytest
import torch
from test_families_packed import make_encoder, make_prompts, responses

from rlaif_fast.errors import UsageError
from rlaif_fast.policy import linear_attention
from rlaif_fast.policy.linear_attention import Keep, NodeStates, RowStates
from rlaif_fast.policy.packing import PackedRow, make_buckets, pack
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler, tokens_a_state

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def decoder():
    model, _ = family_checkpoints.make_model("qwen3_5", dtype=torch.float64)
    decoder = model.model.language_model
    with torch.no_grad():  # decays of about a half, so that what is behind counts
        decoder.layers[0].linear_attn.A_log.fill_(-1.0)
    linear_attention.install(decoder)
    return decoder


def rows() -> dict[str, PackedRow]:
    """Responses that begin alike, repeats, empty ones, prompts shorter than a tail, groups of very unequal length."""
    tree = np.array([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 8], [4, 0, 0, 0], [5, 6, 7, 1]])
    two = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0]])
    return {
        "tree": pack(tree, np.array([4, 3, 4, 1, 4]), np.array([9]), np.array([5])),
        "short prompts": pack(two, np.array([6, 2, 0, 3]), np.array([2, 1]), np.array([2, 2])),
        "unequal": pack(two, np.array([6, 2, 1, 3]), np.array([270, 3, 90]), np.array([2, 1, 1])),
        "nothing fed": pack(two[:2], np.array([1, 1]), np.array([4, 6]), np.array([1, 1])),
    }


ROWS = rows()


def paths(row: PackedRow) -> list[tuple[list[int], list[int]]]:
    """The places of each response's prompt, and of its fed tokens."""
    groups = np.repeat(np.arange(len(row.group_sizes)), row.group_sizes)
    made = []
    for group, path in zip(groups, row.path):
        begin = row.group_starts[group]
        made.append(
            (list(range(begin, begin + row.prompt_lengths[group])), row.node_index[path[path >= 0]].tolist())
        )
    return made


def by_itself(layer, hidden: torch.Tensor, row: PackedRow) -> torch.Tensor:
    """The layer's own forward on each sequence; every place of the row gets the output of one that passes it."""
    output = hidden.new_zeros(hidden.shape[1:])
    for prompt, fed in paths(row):
        places = torch.tensor(prompt + fed)
        output = output.index_copy(0, places, layer(hidden[:, places])[0])
    return output[None]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_equals_its_sequences(decoder, name) -> None:
    row, layer = ROWS[name], decoder.layers[0].linear_attn
    if name == "unequal":
        assert len(make_buckets(row)) > 1
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, row.tokens, 32, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, row.tokens, 32, generator=generator, dtype=torch.float64)
    results = []
    for states in (None, linear_attention.row_states(decoder, row, torch.device("cpu"))):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        output = by_itself(layer, x, row) if states is None else layer(x, shared_states=states)
        # Each response counts, also where the row holds its tokens once.
        (output * weights)[
            0, [place for _, fed in paths(row) for place in fed] or slice(None)
        ].sum().backward()
        grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        results.append((output.detach(), x.grad.clone(), grads))
    (expected, expected_grad, expected_grads), (output, grad, grads) = results
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
    scale = max(1.0, float(expected_grad.abs().max()))
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=TOLERANCE * scale)
    assert grads.keys() == expected_grads.keys()
    for key, one in expected_grads.items():
        scale = max(1.0, float(one.abs().max()))
        torch.testing.assert_close(grads[key], one, rtol=0, atol=TOLERANCE * scale, msg=key)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_what_stands_behind_a_response_goes_on(decoder, name) -> None:
    """Two more tokens for each response, one at a time, against its whole sequence."""
    row, layer = ROWS[name], decoder.layers[0].linear_attn
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, row.tokens, 32, generator=generator, dtype=torch.float64)
    count = len(row.lengths)
    more = torch.randn(2, count, 32, generator=generator, dtype=torch.float64)
    nodes, states = np.random.default_rng(0).permutation(count), NodeStates()
    with torch.no_grad():
        keep = Keep(states, nodes, count)
        layer(hidden, shared_states=RowStates(row, 3, torch.device("cpu"), keep))
        first = layer(more[:1], shared_states=states)[0]
        states.select(torch.arange(count).flip(0))  # they may be put in another order
        second = layer(more[1:, torch.arange(count).flip(0)], shared_states=states)[0].flip(0)
        for response, (prompt, fed) in enumerate(paths(row)):
            node = nodes[response]
            sequence = torch.cat((hidden[0, prompt + fed], more[:, node]))[None]
            expected = layer(sequence)[0, -2:]
            got = torch.stack((first[node], second[node]))
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_without_states_the_layer_is_its_own(decoder) -> None:
    model, _ = family_checkpoints.make_model("qwen3_5", dtype=torch.float64)
    own = model.model.language_model.layers[0].linear_attn
    own.load_state_dict(decoder.layers[0].linear_attn.state_dict())
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = own(hidden)
    linear_attention.install(model.model.language_model)
    forward = own.forward
    linear_attention.install(model.model.language_model)  # twice is once
    assert own.forward is forward
    assert torch.equal(own(hidden), expected)
    assert torch.equal(copy.deepcopy(own)(hidden), expected)


def test_responses_with_lora_and_checkpointing_have_the_same_gradients() -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = family_checkpoints.make_model("qwen3_5", dtype=torch.float64)
    prompts = make_prompts(make_encoder("qwen3_5", tokenizer, model.config))
    ids, lengths = responses(tokenizer)
    targets = ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, config).train()
    found = []
    for shared, checkpointing in ((False, False), (True, False), (True, True)):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.zero_grad()
        policy = Policy(model, tokenizer, shared_prefix=shared)
        policy.response_logps(prompts, ids, lengths).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert any("linear_attn.in_proj_qkv.lora_B" in name for name in other)
        for name, grad in found[0].items():
            scale = max(1.0, float(grad.abs().max()))
            torch.testing.assert_close(other[name], grad, rtol=0, atol=TOLERANCE * scale, msg=name)


def test_states_take_room_among_what_a_rollout_holds() -> None:
    model, tokenizer = family_checkpoints.make_model("qwen3_5")
    policy = Policy(model, tokenizer)
    # 4 heads of 8 x 8 and 64 channels of 3 inputs, against one layer's 2 heads of 8 keys and 8 values.
    assert tokens_a_state(policy) == -(-(4 * 64 + 64 * 3) // 32)
    prompts = make_prompts(make_encoder("qwen3_5", tokenizer, model.config))
    params = SamplingParams(max_new_tokens=6, seed=4)
    expected = PlainSampler(Policy(model, tokenizer, shared_prefix=False)).sample(prompts, 3, params)
    policy.max_cached_tokens = 150  # two turns and more
    rollout = SharedPrefixSampler(policy).sample(prompts, 3, params)
    assert rollout.token_ids.tolist() == expected.token_ids.tolist()
    other, tokenizer = family_checkpoints.make_model("qwen3_vl")
    assert tokens_a_state(Policy(other, tokenizer)) == 0


def test_captured_steps_are_refused() -> None:
    model, tokenizer = family_checkpoints.make_model("qwen3_5")
    policy = Policy(model, tokenizer)
    prompts = make_prompts(make_encoder("qwen3_5", tokenizer, model.config))
    with pytest.raises(UsageError, match="cuda_graphs does not know linear-attention layers"):
        GraphSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=2))
