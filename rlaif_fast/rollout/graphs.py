"""The shared-prefix rollout with decode steps of fixed shapes, captured once as a CUDA graph and replayed.

A decode step of a few hundred tokens makes a thousand small launches, and on a GPU these launches dominate its time.
Here every response is fed at every step, finished or not, and every group attends to its whole buffer under a mask, so
no shape changes from step to step, nor between rollouts with as many groups and a buffer of the same rounded length.
The price: responses that begin alike are computed separately, and finished ones go on.

Draws, and so tokens, are those of the other samplers.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.errors import UsageError, typed_line
from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.policy.linear_attention import state_size
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prefix_decode import prefix_decode, refuses_prefix_decode
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import Rollout, SamplingParams
from rlaif_fast.rollout.fused_layers import FusedLayers, refuses_fused_layers
from rlaif_fast.rollout.generate import TokenSampler, make_rollout
from rlaif_fast.rollout.labels import LabelSampler
from rlaif_fast.rollout.shared_prefix import GroupCache, SharedPrefixSampler
from rlaif_fast.streams import capturing

log = logging.getLogger(__name__)

LENGTH_STEP = 256  # buffers are this much longer at a time, so that rollouts of similar prompts share a graph
STOP_CHECK = 8  # steps between two looks at whether every response has ended
MAX_STEPS = 3  # kept at a time: a rollout's, its last part's, an evaluation's
CHECKED_STEPS = 4  # steps fed before two implementations are compared
TIMED_STEPS = 20  # steps timed of each implementation
# Times this close decide nothing: where the host is the bottleneck, chance would decide what a seed draws.
SAME_TIME = 1.1
WARM_UP_STEPS = 3  # before a capture, as torch asks: libraries allocate and choose kernels on first use


def uses_kernel(attention: str, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether a step attends by the `prefix_decode` kernel; "auto" does on a GPU where it can run.

    Raises:
        ValueError: The name is unknown, or the kernel was asked for and cannot run here.
    """
    if attention not in ("auto", "kernel", "sdpa"):
        raise ValueError(f"attention: expected auto, kernel or sdpa, got {attention!r}")
    if attention == "sdpa" or (attention == "auto" and device.type != "cuda"):
        return False
    reason = refuses_prefix_decode(device.type, dtype, head_size)
    if reason is not None and attention == "kernel":
        raise ValueError(f"attention: the prefix_decode kernel cannot run here: {reason}")
    return reason is None


class FixedStep:
    """One token for each response of N groups, against the groups' buffers; the attention context of its own pass.

    Args:
        policy: The policy.
        groups: N.
        num_generations: G.
        length: L, columns of a group's buffer.
        attention: "auto", "kernel" (`prefix_decode`) or "sdpa" (see `uses_kernel`).
        fused: Compute the layers by fused kernels where they can (see `fused_layers`).

    Raises:
        UsageError: The decoder has linear-attention layers, whose states a replayed step would move on twice.
    """

    def __init__(
        self,
        policy: Policy,
        groups: int,
        num_generations: int,
        length: int,
        *,
        attention: str = "auto",
        fused: bool = False,
    ) -> None:
        if policy.pattern is not None:
            raise UsageError(
                "sampler: cuda_graphs does not know layers with a window, nor pictures whose tokens see each other; "
                "use auto or shared_prefix"
            )
        if state_size(policy.decoder):
            raise UsageError(
                "sampler: cuda_graphs does not know linear-attention layers; use auto or shared_prefix"
            )
        device = policy.device
        self._dtype = dtype = dtype_of(device, policy.head_weight.dtype)
        responses = groups * num_generations
        self.shape = (groups, num_generations, length)
        self.cache = GroupCache(policy, np.zeros(groups, dtype=np.int64), length)
        self.keys, self.values = self.cache.keys, self.cache.values
        self._policy = policy
        self._ids = torch.zeros(responses, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3, responses, dtype=torch.int64, device=device)
        self.columns = torch.zeros(responses, dtype=torch.int64, device=device)
        each = torch.arange(responses, device=device)
        self.groups, self._slot = each // num_generations, each % num_generations
        self._prompts = torch.zeros(groups, dtype=torch.int32, device=device)
        self._own = torch.zeros(1, dtype=torch.int32, device=device)
        self._bias: Tensor | None = None  # (N, heads that share a key head, G, L) additive
        if not uses_kernel(attention, device, dtype, self.cache.head_size):
            self._bias = torch.zeros(
                groups, self.cache.heads_per_key, num_generations, length, dtype=dtype, device=device
            )
        self._layers = FusedLayers(policy) if fused and refuses_fused_layers(policy) is None else None
        self._weights = self._addresses()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None

    def fits(self, groups: int, num_generations: int, length: int) -> bool:
        """Whether a rollout of these sizes can use the step; weights and dtype must be as they were."""
        dtype = dtype_of(self._policy.device, self._policy.head_weight.dtype)
        sizes, weights = (groups, num_generations, length), self._addresses()
        return (self.shape, self._dtype, self._weights) == (sizes, dtype, weights)

    def begin(self, prompt_lengths: np.ndarray) -> None:
        """Start a rollout: each response sees its prompt alone."""
        self.cache.used = prompt_lengths.copy()
        lengths = torch.from_numpy(prompt_lengths).to(self._ids.device)
        self._prompts.copy_(lengths)
        self._begins = lengths[self.groups]
        if self._bias is None:
            return
        visible = torch.arange(self.shape[2], device=self._ids.device) < self._begins[:, None]  # (B, L)
        bias = torch.where(visible, 0.0, float("-inf")).to(self._bias.dtype)
        groups, num_generations, length = self.shape
        self._bias.copy_(bias.view(groups, 1, num_generations, length))

    def __call__(self, tokens: Tensor, positions: Tensor, step: int) -> Tensor:
        """Feed one token (B,) to each response at positions (B,); hidden states (B, H), valid until the next call."""
        self._ids.copy_(tokens)
        self._positions.copy_(positions.expand(3, -1))
        self.columns.copy_(self._begins + step * self.shape[1] + self._slot)
        self._own.fill_(step + 1)
        if self._bias is not None:
            self._bias[self.groups, :, self._slot, self.columns] = 0.0
        if self._graph is not None:
            with torch.cuda.device(self._ids.device):
                self._graph.replay()
        elif self._ids.is_cuda:
            self._capture()
        else:
            self._hidden = self._run()
        assert self._hidden is not None
        return self._hidden

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.groups, self.columns, key, value)
        return self.read(layer, query[0].transpose(0, 1), scale)[None]

    def read(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend from the queries (B, H, D) of a layer to what is in its buffer, (B, H, D)."""
        groups, num_generations, length = self.shape
        if self._bias is not None:
            return self.cache.attend(layer, query, self._bias.view(groups, 1, -1, length), scale)
        q = query.unflatten(0, (groups, num_generations)).transpose(1, 2)  # (N, H, G, D)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        output = prefix_decode(q, keys, values, self._prompts, self._own, scale)
        return output.transpose(1, 2).flatten(0, 1)

    def _run(self) -> Tensor:
        kind = self._ids.device.type
        # Autocast drops its cached casts of the weights when it ends, so a captured step must make its own.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            if self._layers is not None:
                return self._layers(self._ids, self._positions, self)
            return self._policy.decode(self._ids, self._positions, self)

    def _capture(self) -> None:
        # Feeding the same tokens again writes the same keys to the same columns, so warming up changes nothing.
        device = self._ids.device
        with torch.cuda.device(device):  # streams and captures are of the current device
            stream = _stream(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                self._graph = self._captured(stream)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a library's own thread may synchronise the device at any time
                log.warning("rollout: a decode step is captured once more (%s)", typed_line(error)[:160])
                self._graph = self._captured(stream)
            self._graph.replay()

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        recorded = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
        present = torch.cuda.current_stream()  # a failed capture does not make it current again by itself
        failed: BaseException | None = None
        try:
            with capturing(), torch.cuda.stream(present), recorded:
                try:
                    self._hidden = self._run()
                except BaseException as error:
                    failed = error
                    raise
        except BaseException:
            # PyTorch's allocator would take the capture to go on forever, and never free memory that two streams used.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(stream.device.index, pool)
            # The error that ends a broken capture only says that something failed before.
            if failed is not None:
                raise failed from None
            raise
        finally:
            failed = None  # its traceback holds this frame, and with it memory of the GPU
        return graph

    def _addresses(self) -> tuple[int, ...]:
        return tuple(p.data_ptr() for p in self._policy.model.parameters())


def check_graphs(policy: Policy) -> str | None:
    """Return why a captured decode step must not be used for this policy on its device, or None.

    A small step is captured, replayed with other tokens and run again eagerly; both must give the same hidden states.
    """
    try:
        with torch.no_grad(), policy.evaluating():
            step, captured = _small_step(policy)
            return _unlike("a captured step", captured, "an eager one", step._run(), 2e-2)
    except Exception as error:  # a driver, a library or a model's own code may refuse a capture
        _draw_again(policy.device)
        return typed_line(error)[:160]


def _draw_again(device: torch.device) -> None:
    """Make a GPU's random numbers usable again after a failed capture.

    PyTorch 2.11 keeps the generator's state marked as captured, and dropout then raises; a copy of the state is not
    marked.
    """
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())


def check_fused(policy: Policy, attention: str = "auto") -> str | None:
    """Return why the layers of a policy must not be computed by fused kernels on its device, or None.

    A small step by the kernels is compared with one by the model's own modules, in values and in time; both are
    captured.
    """
    reason = refuses_fused_layers(policy)
    if reason is not None:
        return reason
    try:
        with torch.no_grad(), policy.evaluating():
            plain, expected = _small_step(policy, attention)
            fused, found = _small_step(policy, attention, fused=True)
            # Sums in another order: in 16 bits a deep decoder's last hidden states differ by a few percent.
            reason = _unlike("a step by fused kernels", found, "one of the modules", expected, 5e-2)
            by_modules, by_kernels = _milliseconds(plain), _milliseconds(fused)
    except Exception as error:  # a driver or a compiler may refuse a kernel
        return typed_line(error)[:160]
    log.info("rollout: a decode step takes %.2f ms by fused kernels, %.2f by modules", by_kernels, by_modules)
    if reason is None and by_kernels > SAME_TIME * by_modules:
        return f"a step takes {by_kernels:.2f} ms by them, {by_modules:.2f} by the modules"
    return reason


def _small_step(policy: Policy, attention: str = "auto", *, fused: bool = False) -> tuple[FixedStep, Tensor]:
    """A step that fed two responses some tokens, captured at the first, and the hidden states of the last.

    One token would not do: its hidden states would not depend on its position, with only zeros before it.
    """
    step = FixedStep(
        policy, groups=1, num_generations=2, length=LENGTH_STEP, attention=attention, fused=fused
    )
    step.begin(np.ones(1, dtype=np.int64))
    known = policy.token_ids_allowed.nonzero()[:, 0]
    places = torch.arange(2 * CHECKED_STEPS, device=policy.device) * len(known) // (2 * CHECKED_STEPS)
    for number, tokens in enumerate(known[places].view(CHECKED_STEPS, 2)):
        hidden = step(tokens, torch.full_like(tokens, 1 + number), number)
    return step, hidden.clone()


def _milliseconds(step: FixedStep) -> float:
    """Time of a step that has run before: the shortest of several, since the host may have other work meanwhile."""
    tokens, positions = step._ids.clone(), step._positions[0].clone()
    taken = []
    for _ in range(TIMED_STEPS):
        _wait(tokens.device)
        begun = time.perf_counter()
        step(tokens, positions, 0)
        _wait(tokens.device)
        taken.append(time.perf_counter() - begun)
    return 1000 * min(taken)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that every step of a GPU is captured on.

    One for all: PyTorch keeps a workspace for each stream that a matmul ran on, 32 MiB on Hopper. PyTorch's own stream
    for captures belongs to the GPU that captured first.
    """
    return torch.cuda.Stream(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _unlike(what: str, found: Tensor, other: str, expected: Tensor, bound_16_bit: float) -> str | None:
    """Return a message where two results differ by more than rounding, else None."""
    distance = float((found - expected).float().norm() / expected.float().norm())
    bound = 1e-4 if expected.dtype == torch.float32 else bound_16_bit
    return None if distance < bound else f"{what} is off by {distance:.1e} of {other}"


class GraphSampler(SharedPrefixSampler):
    """`SharedPrefixSampler` with fixed decode steps; a CUDA graph on a GPU, the same steps uncaptured elsewhere.

    Args:
        policy: The policy.
        attention: See `FixedStep`.
        fused: See `FixedStep`; None asks `check_fused` before the first rollout on a GPU, and is False elsewhere.
    """

    def __init__(self, policy: Policy, *, attention: str = "auto", fused: bool | None = None) -> None:
        super().__init__(policy, cpu_decoder=False)
        self._attention = attention
        self._fused = fused if fused is not None or policy.device.type == "cuda" else False
        self._steps: OrderedDict[tuple[int, int, int], FixedStep] = OrderedDict()  # the last used is the last
        self._step: FixedStep | None = None

    def _make_cache(self, prompt_lengths: np.ndarray, num_generations: int, length: int) -> GroupCache:
        sizes = (len(prompt_lengths), num_generations, -(-length // LENGTH_STEP) * LENGTH_STEP)
        step = self._steps.pop(sizes, None)
        if step is None or not step.fits(*sizes):
            self._step = step = None
            while len(self._steps) >= MAX_STEPS:  # buffers are freed before new ones are made
                self._steps.popitem(last=False)
            if self._fused is None:
                reason = check_fused(self.policy, self._attention)
                self._fused = reason is None
                log.info(
                    "rollout: fused decode layers %s",
                    "are used" if reason is None else f"are not used: {reason}",
                )
            step = FixedStep(self.policy, *sizes, attention=self._attention, fused=self._fused)
        self._steps[sizes] = self._step = step
        step.begin(prompt_lengths)
        return step.cache

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        cache: GroupCache,
        hidden: Tensor,
        draw: TokenSampler | LabelSampler,
        uniform: Tensor,
    ) -> Rollout:
        policy, device, feed = self.policy, self.policy.device, self._step
        assert feed is not None
        responses = len(prompts) * num_generations
        group = torch.arange(responses, device=device) // num_generations
        first = [policy.layouts(prompt).next_position for prompt in prompts]
        next_position = torch.tensor(first, device=device)[group]
        eos = torch.tensor(policy.eos_token_ids, device=device)
        token_ids = torch.zeros(responses, params.max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(responses, params.max_new_tokens, device=device)
        finished = torch.zeros(responses, dtype=torch.bool, device=device)
        lengths = torch.zeros(responses, dtype=torch.int64, device=device)
        for step in range(params.max_new_tokens):
            tokens, logp = draw(policy.logits(hidden), group if step == 0 else None, uniform[:, step], step)
            token_ids[:, step], logps[:, step] = tokens, logp
            lengths += ~finished
            finished |= torch.isin(tokens, eos)
            # Only here the host waits for the device; steps after the last response's end are thrown away.
            if step + 1 == params.max_new_tokens or (step % STOP_CHECK == STOP_CHECK - 1 and finished.all()):
                break
            hidden = feed(tokens, next_position + step, step)
        ids, drawn, ends, done = (x.numpy(force=True) for x in (token_ids, logps, lengths, finished))
        return make_rollout(policy, prompts, num_generations, ids, drawn, ends, done, draw.forced)
