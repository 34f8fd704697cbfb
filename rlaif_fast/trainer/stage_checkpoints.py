"""The checkpoints of a stage: however it ends, the last finished step is saved if the state is still that step's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlaif_fast.distributed.world import SharedOutage
from rlaif_fast.errors import typed_line
from rlaif_fast.termination import StepGivenUp, Terminated
from rlaif_fast.trainer.run import Run


class StageCheckpoints:
    """Writes the checkpoints of a stage, including a last one when an error or a signal ends it.

    Args:
        run: The run.
        stage: "sft" or "rl".
        step: Steps done so far, which are saved.
        state: Returns what else a checkpoint keeps. Its argument says whether this process must act without the others.
        changes: Counts changes of the weights and their optimizers; an equal count means that nothing has changed.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        step: int,
        state: Callable[[bool], dict[str, Any]],
        changes: Callable[[], Any],
    ) -> None:
        self._run, self._stage, self._state, self._changes = run, stage, state, changes
        self.step = step
        self._due: dict[str, bool] | None = None  # the roles of a checkpoint that is not written yet
        self._whole_at: tuple[Any, int] | None = self._now()
        self._writing = False

    def finished(self, step: int) -> None:
        """Take note that `step` steps are done and logged."""
        self.step, self._due, self._whole_at = step, {}, self._now()

    def save(self, **roles: bool) -> None:
        """Write a checkpoint of the last finished step to resume from, which may play other roles too."""
        # If the previous checkpoint could not be written, its roles are lost; wait first, lest this one hide it.
        self._whole_at = None
        self._run.store.wait()
        self._due, self._whole_at = roles, self._now()
        self._write()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A block of steps. If it breaks, the last finished one is saved, or the log says why it cannot be."""
        try:
            yield
        except BaseException as error:
            world = self._run.world
            shared = world.size == 1 or isinstance(error, SharedOutage) or _is_asked_for(error)
            if shared or world.is_main:
                self._keep(error, alone=not shared)
            raise

    def may_give_up(self) -> bool:
        """Whether this process may abandon the step: it is rank 0, has all weights, and nothing has changed them."""
        run = self._run
        has_all = run.world.is_main and (run.world.size == 1 or run.policy.shards is None)
        return has_all and not self._writing and self._whole_at == self._now()

    def _keep(self, error: BaseException, *, alone: bool) -> None:
        """Save what is due, in all processes or in rank 0 alone, which has all weights unless they are sharded."""
        self._writing = True
        run, due, reason = self._run, self._due is not None, None
        if alone:
            run.world.expect_end()
        if due and self._whole_at is None:
            reason = "the checkpoint before it could not be written"
        elif due and self._whole_at != self._now():
            reason = "the run ended inside an update or a record"
        elif due and alone and run.policy.shards is not None:
            reason = "the weights are sharded, and the other processes are not there to save theirs"
        try:
            if due and reason is None:
                self._write(alone)
            if alone:
                run.store.wait()
            else:
                run.wait_until_saved()
        except Exception as refused:
            if isinstance(error, Terminated):
                raise
            reason = typed_line(refused)
        if reason is not None:
            run.logger.message(f"{self._stage} step {self.step} is not saved: {reason}")
        elif self.step and not _is_asked_for(error):
            run.logger.message(f"{self._stage} step {self.step} is saved; --resume goes on from there")

    def _write(self, alone: bool = False) -> None:
        assert self._due is not None
        run, roles, self._writing = self._run, self._due, True
        state = {"stage": self._stage, "step": self.step} | run.usage(alone=alone) | self._state(alone)
        with run.logger.timer("checkpoint"):
            name = f"{self._stage}-{self.step:06d}"
            run.store.save(name, run.policy.model, run.policy.tokenizer, state, last=True, **roles)
        self._due, self._writing = None, False

    def _now(self) -> tuple[Any, int]:
        return self._changes(), self._run.logger.records


def _is_asked_for(error: BaseException) -> bool:
    """Whether the run was told to end, and all processes end it after the same step."""
    return isinstance(error, Terminated) and not isinstance(error, StepGivenUp)
