"""prime-rl (0.8): a custom loss, and an algorithm with credit from an oracle.

Set `trainer.loss.type = "custom"` and `import_path = "rlaif_fast.adapters.prime_rl.loss"`; call `register(oracle)` in
the orchestrator's process before it builds its environments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlaif_fast.adapters.ranking import RowRanker
from rlaif_fast.loss.api import grpo_rank_loss
from rlaif_fast.oracle.base import Oracle


def loss(inputs: Any, **options: Any) -> Any:
    """Return prime-rl's `LossOutputs` of one response: see `summed`."""
    from prime_rl.trainer.rl.loss import LossOutputs

    total, metrics = summed(inputs, **options)
    return LossOutputs(loss=total, metrics=metrics)


def summed(inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the loss over the tokens of one response, and statistics.

    Args:
        inputs: `trainer_logprobs`, `inference_logprobs`, `ref_logprobs` or None, `advantages`, `loss_mask`, all (seq,);
            `loss_weights` must be None.
        options: Options of `grpo_rank_loss`.

    Raises:
        ValueError: There are loss weights, or an option that the loss does not have.
    """
    if getattr(inputs, "loss_weights", None) is not None:
        raise ValueError("loss_weights must be None: this loss has no weight a token")
    reference = inputs.ref_logprobs
    out = grpo_rank_loss(
        inputs.trainer_logprobs[None],
        old_logps=inputs.inference_logprobs[None],
        ref_logps=None if reference is None else reference[None],
        advantages=inputs.advantages[None],
        mask=inputs.loss_mask[None],
        loss_type="luspo",  # the sum over the tokens of a response
        **options,
    )
    return out.loss, out.stats


def register(oracle: Oracle, name: str = "grpo", **options: Any) -> None:
    """Let an oracle replace the rewards of one of prime-rl's algorithms, since its union of types is closed.

    Args:
        oracle: Ranks the rollouts of a group.
        name: An algorithm that feeds the "rl" loss.
        options: Options of `ranked_algorithm`.
    """
    from prime_rl.orchestrator.algo import ALGORITHM_CLASSES

    ALGORITHM_CLASSES[name] = ranked_algorithm(ALGORITHM_CLASSES[name], oracle, **options)


def ranked_algorithm(base: type, oracle: Oracle, *, reference: str = "answer", **options: Any) -> type:
    """Return a subclass of one of prime-rl's algorithms whose `score_group` ranks the rollouts of a group.

    Args:
        base: `GRPOAlgorithm`, or another `Algorithm` of `prime_rl.orchestrator.algo`.
        oracle: Ranks them; rollouts that failed or train nothing are left out.
        reference: Key of a trace's info, or field of its task, with the reference answer.
        options: Options of `RowRanker`.
    """
    from prime_rl.orchestrator.algo.base import iter_trainable_traces
    from prime_rl.orchestrator.algo.routing import assign_advantages

    ranker = RowRanker(oracle, **options)

    class OracleAlgorithm(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, policy_pool: Any) -> None:
            if getattr(config, "length_penalty", None) is not None:
                raise ValueError("length_penalty must be null: it shapes rewards, and ranks have none")
            super().__init__(config, policy_pool)

        async def score_group(self, episodes: list[Any]) -> None:
            """Assign every token of a rollout the advantage of its rank."""
            traces = [trace for _, trace in iter_trainable_traces(episodes)]
            credit = await asyncio.to_thread(advantages, ranker, traces, reference)
            for trace, advantage in zip(traces, credit):
                assign_advantages(trace, advantage)

    return OracleAlgorithm


def advantages(ranker: RowRanker, traces: Sequence[Any], reference: str = "answer") -> list[float]:
    """Return the advantage of each trace of one group.

    The oracle reads the last branch: everything before the first sampled message is the prompt, every sampled message
    the response. The policy's own order is by the mean log-probability of the sampled tokens; a trace without any has
    no advantage.

    Raises:
        ValueError: The kind needs that order, and a sampled message has no log-probabilities.
    """
    prompts, responses, answers, logps = [], [], [], []
    for trace in traces:
        nodes = trace.branches[-1].nodes
        first = next((i for i, node in enumerate(nodes) if node.sampled), len(nodes))
        prompts.append([_chat(node.message) for node in nodes[:first]])
        responses.append("\n".join(node.message.content or "" for node in nodes[first:] if node.sampled))
        answers.append(trace.info.get(reference, getattr(trace.task.data, reference, None)))
        logps.append(_logps(trace))
    scores = ranker.scores(logps, "a sampled message has no logprobs; sample with them")
    return ranker([0] * len(traces), prompts, responses, answers, scores).advantages.tolist()


def _logps(trace: Any) -> list[float] | None:
    sampled = [node.logprobs for node in trace.nodes if node.sampled]
    return [logp for logps in sampled for logp in logps] if all(sampled) else None


def _chat(message: Any) -> dict[str, Any]:
    parts = message.content
    if isinstance(parts, list):
        parts = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image", "image": part.image_url.url}
            for part in parts
        ]
    return {"role": message.role, "content": parts or ""}
