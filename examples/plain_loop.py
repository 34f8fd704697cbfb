"""GRPO_rank in a plain PyTorch loop: sums of two digits, ranked by their distance from the right one.

python examples/plain_loop.py
"""

from __future__ import annotations

import sys

import tiny_text_model
import torch

from rlaif_fast import fused_linear_grpo_rank_loss

G, T = 8, 2  # responses a prompt, tokens a response


def main(steps: int = 60, groups: int = 4) -> list[float]:
    """Train; return the share of right answers of each step."""
    model, tokenizer = tiny_text_model.model().train(), tiny_text_model.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, right = torch.Generator().manual_seed(0), []
    digits = torch.tensor([tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])
    for _ in range(steps):
        a, b = torch.randint(0, 5, (2, groups), generator=generator).tolist()
        questions = [f"how many is {x} plus {y} ?" for x, y in zip(a, b)]
        prompts = tokenizer(questions, return_tensors="pt").input_ids.repeat_interleave(G, dim=0)  # (B, P)
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=T,
            min_new_tokens=T,
            do_sample=True,
        )
        said = (ids[:, -T, None] == digits).float() @ torch.arange(10.0)  # the first word; no digit is 0
        said = said.where(torch.isin(ids[:, -T], digits), -9.0).view(groups, G)
        ranks = (said - (torch.tensor(a) + torch.tensor(b))[:, None]).abs()  # only their order counts
        hidden = model.base_model(ids).last_hidden_state[:, -T - 1 : -1]
        out = fused_linear_grpo_rank_loss(
            hidden, model.lm_head.weight, ids[:, -T:], ranks, kind="directed", scale="group"
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        right.append((ranks == 0).float().mean().item())
        print(f"loss {out.loss.item():+.3f}  nDCG {out.stats['ndcg'].item():.3f}  right {right[-1]:.2f}")
    return right


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
