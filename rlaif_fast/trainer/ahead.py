"""`rollout_lag: 1`: servers draw the next step's responses while this step's are ranked and learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import cast

from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout.base import Answer, Begun, Rollout, Sampler, SamplerElsewhere, SamplingParams

# answers by example id, as a checkpoint keeps them
Drawn = list[tuple[str, list[tuple[list[int], list[float]]]]]


class RolloutAhead:
    """Rollouts in progress or drawn, for at most two steps.

    Step t learns from responses drawn with the weights at the beginning of step t - 1; step 0 from those of its own.

    Args:
        sampler: A sampler that draws outside this process.
        policy: The policy whose weights the sampler gets.
        num_generations: Responses per prompt.
        ask: Returns what this process asks in a step: its prompts, if any, and how to answer them.
        steps: Steps of the stage.
        drawn: From a checkpoint: the responses its next step learns from.

    Raises:
        UsageError: The sampler draws in this process.
    """

    def __init__(
        self,
        sampler: Sampler,
        policy: Policy,
        num_generations: int,
        ask: Callable[[int], tuple[Sequence[Prompt], SamplingParams]],
        steps: int,
        drawn: Drawn | None = None,
    ) -> None:
        if not sampler.draws_elsewhere:
            raise UsageError("rollout_lag: expected 0 where no server draws, got 1")
        self._sampler = cast(SamplerElsewhere, sampler)
        self._policy = policy
        self._num_generations = num_generations
        self._ask = ask
        self._steps = steps
        self._drawn = drawn
        self._begun: dict[int, Begun[Prompt] | None] = {}

    def begin(self, step: int) -> Begun[Prompt] | None:
        """The rollout of a step, started with the present weights unless it already was; None if it asks nothing."""
        if step not in self._begun and step < self._steps:
            prompts, params = self._ask(step)
            known, self._drawn = self._drawn, None
            answers = None if known is None else _answers_to(prompts, known)
            if not prompts:
                begun: Begun[Prompt] | None = None
            elif answers is not None:
                begun = Begun(prompts, params, answers)
            else:
                self._sampler.sync_weights(self._policy)
                begun = self._sampler.begin(prompts, self._num_generations, params)
            self._begun = {old: kept for old, kept in self._begun.items() if old == step - 1} | {step: begun}
        return self._begun.get(step)

    def finish(self, begun: Begun[Prompt], features: MediaFeatures | None) -> Rollout:
        """Wait for what was begun and return it; see `SamplerElsewhere`."""
        return self._sampler.finish(begun, features)

    def drawn(
        self, step: int, world: World, *, alone: bool = False, note: Callable[[str], None] = lambda line: None
    ) -> Drawn:
        """What a checkpoint before `step` keeps, once drawn. A process whose drawing failed contributes nothing.

        Args:
            step: The step that learns from it.
            world: The processes whose parts are gathered.
            alone: Do without the other processes, because one of them is gone.
            note: Told if a part is missing.
        """
        if self._drawn is not None:
            return self._drawn  # from the checkpoint resumed from; no process has asked anything since
        mine = self._drawn_here(step)
        parts = [mine] if alone else world.gather(mine)
        if step < self._steps and (None in parts or len(parts) < world.size):
            note(
                f"the checkpoint lacks responses that were drawn ahead for step {step + 1}; a resumed run draws anew"
            )
        return [group for part in parts for group in part or ()]

    def _drawn_here(self, step: int) -> Drawn | None:
        """This process's part; None if the drawing failed."""
        begun = self._begun.get(step)
        if begun is None:
            return []
        wait([begun.answers])
        if begun.answers.exception() is not None:
            return None
        return [
            (prompt.example.id, [(list(answer.token_ids), list(answer.logps)) for answer in group])
            for prompt, group in zip(begun.prompts, begun.answers.result())
        ]


def _answers_to(prompts: Sequence[Prompt], drawn: Drawn) -> Future[list[list[Answer]]] | None:
    """The kept answers to these prompts; None if a prompt has none."""
    by_id: dict[str, list[list[Answer]]] = {}
    for example_id, group in drawn:
        by_id.setdefault(example_id, []).append([Answer(tokens, logps) for tokens, logps in group])
    kept = [by_id[prompt.example.id].pop(0) if by_id.get(prompt.example.id) else None for prompt in prompts]
    answers: Future[list[list[Answer]]] = Future()
    answers.set_result([group for group in kept if group is not None])
    return answers if all(group is not None for group in kept) else None
