"""The policy: a Hugging Face Video-LLM and the three operations that training needs.

`encode_media` runs the vision tower, `response_hidden` gives the hidden states that predict the response
tokens, and `response_logps` their log-probabilities. With `shared_prefix` every prompt is computed once per
group (`packing`, `attention`); without it the plain padded path runs (`plain`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlaif_fast.errors import UsageError
from rlaif_fast.loss.api import token_logps
from rlaif_fast.policy import attention, deepstack, linear_attention, vision_attention
from rlaif_fast.policy.families import (
    PromptLayouts,
    eos_token_ids,
    family_of,
    marker_token_ids,
    refuse_far_positions,
    text_decoder,
    unwrap,
)
from rlaif_fast.policy.features import MediaFeatures, VisionEncoder
from rlaif_fast.policy.packing import PackedRow, count_rows, pack_rows
from rlaif_fast.policy.pattern import backend_name, row_context
from rlaif_fast.policy.plain import inner_model, plain_hidden
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.reference import Pairs, copies_of, exchanged, is_new_lora
from rlaif_fast.policy.shard import Shards
from rlaif_fast.policy.vocabulary import allowed_tokens
from rlaif_fast.policy.weights import float32_copy

T = TypeVar("T")

# The logit bias of a forbidden token. It is finite, so that p * log p is 0 and not NaN. exp(FORBIDDEN - any logit)
# is exactly 0 in float32 at every temperature up to 100. It fits the range of float16.
FORBIDDEN = -3e4


class Policy:
    """A Video-LLM that is sampled from and trained.

    Args:
        model: A `...ForConditionalGeneration` of a known family, perhaps inside a peft wrapper. Its weights are
            used in place.
        tokenizer: Its tokenizer.
        shared_prefix: Compute each prompt once per group; False is the plain padded path, for any family.
        attention_backend: "auto", or a name of `attention.ATTENTION_BACKENDS`.
        forbidden_token_ids: Tokens that are never sampled, besides the special ones. End-of-sequence tokens
            stay allowed.
        max_packed_tokens: Most tokens of a packed row; a single longer group still gets a row.
        feature_cache_bytes: Budget for cached features of a frozen vision tower, kept from step to step.
        max_cached_tokens: Most tokens of prompts and responses whose keys and values a rollout holds at once; more
            prompts take turns.

    Attributes:
        eos_token_ids: The tokens that end a response.
        pad_token_id: What fills a rollout after the end of a response.
        media_token_ids: The tokens that represent media or mark where they begin and end.
        shards: How its weights are cut over the processes (`shard_policy`); None if each process holds them all.

    Raises:
        UsageError: `shared_prefix` with a family it does not know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        shared_prefix: bool = True,
        attention_backend: str = "auto",
        forbidden_token_ids: Sequence[int] = (),
        max_packed_tokens: int = 16384,
        feature_cache_bytes: int = 1 << 30,
        max_cached_tokens: int = 1 << 17,
    ) -> None:
        if not shared_prefix:
            inner_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.shared_prefix = shared_prefix
        self.max_packed_tokens = max_packed_tokens
        self.max_cached_tokens = max_cached_tokens
        self.feature_cache_bytes = feature_cache_bytes
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        pads = (tokenizer.pad_token_id, *self.eos_token_ids)
        self.pad_token_id = next(token for token in pads if token is not None)
        self.media_token_ids = set(marker_token_ids(model))
        self._reference: Pairs | None = None
        self.shards: Shards | None = None
        head = self._head()
        never = (*forbidden_token_ids, *self.media_token_ids)
        allowed = allowed_tokens(len(head.weight), tokenizer, never, self.eos_token_ids)
        self.token_ids_allowed = allowed.to(head.weight.device)  # (V,)
        self.forbidden_bias = torch.where(self.token_ids_allowed, 0.0, FORBIDDEN)
        if shared_prefix:
            family = family_of(model)
            self.decoder = text_decoder(model)
            self.embedding = self.decoder.get_input_embeddings()
            self.vision = VisionEncoder(family.vision(model), feature_cache_bytes, family)
            self.position_axes = family.axes
            self.layouts = PromptLayouts(model, family)
            self.pattern = family.pattern(unwrap(model).config)
            name = backend_name(attention_backend, self.pattern)
            self.backend = attention.choose_backend(name, self.device, head.weight.dtype, self.head_size)
            for layers in (attention, deepstack, linear_attention):
                layers.install(self.decoder)
            if family.batched_vision:
                vision_attention.install(unwrap(model).get_submodule(family.tower))

    @property
    def device(self) -> torch.device:
        """Where passes compute; sharded weights may be in main memory between them."""
        return self.forbidden_bias.device

    @property
    def head_size(self) -> int:
        """D of the decoder's attention."""
        return next(layer.self_attn.head_dim for layer in self.decoder.layers if hasattr(layer, "self_attn"))

    @property
    def head_weight(self) -> Tensor:
        """(V, H) the output embedding."""
        return self._head().weight

    @property
    def head_float32(self) -> Tensor | None:
        """(V, H) the optimizer's float32 copy of a bfloat16 head that trains; it receives the head's gradient."""
        return float32_copy(self._head().weight)

    @property
    def head_bias(self) -> Tensor:
        """(V,) float32 added to the logits: the head's own bias, and `FORBIDDEN` on tokens that are never
        sampled.

        Sampling and training log-probabilities both add it, so they come from one distribution.
        """
        own = getattr(self._head(), "bias", None)
        return self.forbidden_bias if own is None else self.forbidden_bias + own.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) float32 logits of hidden states, including forbidden tokens at about `FORBIDDEN`."""
        return nn.functional.linear(hidden, self.head_weight).float() + self.head_bias

    def _head(self) -> nn.Linear:
        head = unwrap(self.model).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UsageError(
                f"model: its output embedding is a {type(head).__name__}, not a plain linear layer; "
                "leave lm_head out of lora_target_modules and of modules_to_save"
            )
        return head

    def call(self, work: Callable[[], T]) -> T:
        """Run `work`, which reads weights to train them; if they are sharded, all processes call it together."""
        return work() if self.shards is None else self.shards.call(work)

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Hold sharded weights whole, so that each process may run the model any number of times."""
        return contextlib.nullcontext() if self.shards is None else self.shards.gathered()

    def encode_media(self, prompts: Sequence[EncodedPrompt]) -> MediaFeatures | None:
        """Run the vision tower once for each distinct video or image of `prompts` (those with equal
        `Media.key`).

        With gradients enabled and a tower that trains, the features carry the tower's graph; otherwise the cache is
        used if it has them. Returns None if no prompt has media, or on the plain path, which encodes by itself.
        """
        if not self.shared_prefix:
            return None
        return self.vision(prompts) if self.shards is None else self.shards.encode(self.vision, prompts)

    def response_hidden(
        self,
        prompts: Sequence[EncodedPrompt],
        token_ids: Tensor,  # (B, T) int64
        lengths: Tensor,  # (B,)
        *,
        group_sizes: Sequence[int] | Tensor | None = None,
        features: MediaFeatures | None = None,
    ) -> Tensor:
        """Hidden states that predict each response token, differentiable.

        Args:
            prompts: N prompts.
            token_ids: Responses, those of a prompt adjacent; tokens beyond `lengths` are not read.
            lengths: Tokens of each response.
            group_sizes: (N,) responses of each prompt; None if all have equally many.
            features: From `encode_media` of at least these prompts; None to encode here.

        Returns:
            (M, H) packed, response after response, M = lengths.sum(). The first token of a response is
            predicted by the last token of its prompt.
        """
        sizes = count_rows(len(prompts), token_ids, lengths, group_sizes)
        if not self.shared_prefix:
            return plain_hidden(self.model, prompts, token_ids, lengths, sizes.tolist())
        if features is None:
            features = self.encode_media(prompts)
        host_ids = token_ids.numpy(force=True)
        host_lengths = lengths.numpy(force=True).astype(np.int64)
        prompt_lengths = np.asarray([len(p.input_ids) for p in prompts], dtype=np.int64)
        # Sharded weights are gathered once per call in every process, so a call there is one row.
        one_row = self.shards is not None and not self.shards.is_whole
        most = None if one_row else self.max_packed_tokens
        hidden = []
        for groups, rows, row in pack_rows(
            host_ids, host_lengths, prompt_lengths, sizes, most, self.backend.merge
        ):
            hidden.append(self.packed_forward(row, prompts[groups], host_ids[rows], features))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def packed_forward(
        self,
        row: PackedRow,
        prompts: Sequence[EncodedPrompt],
        token_ids: np.ndarray,  # (B, T)
        features: MediaFeatures | None,
        context: attention.AttentionContext | None = None,  # None for the backend's own
        keep: linear_attention.Keep | None = None,  # stores the states after its responses
    ) -> Tensor:
        """Run one packed row; returns the hidden states (M, H) that predict its response tokens."""
        ids = np.empty(row.tokens, dtype=np.int64)
        ids[row.prompt_index] = np.concatenate([p.input_ids.numpy(force=True) for p in prompts])
        ids[row.node_index] = token_ids.reshape(-1)[row.node_source]
        layouts = [self.layouts(p) for p in prompts]
        if context is None:
            context = row_context(row, self.device, self.pattern, layouts, self.backend.context)
        positions = row.position_ids(
            [layout.positions for layout in layouts], np.asarray([layout.next_position for layout in layouts])
        )
        refuse_far_positions(unwrap(self.model).config, int(positions.max()))
        media = [begin + layout.media_index for begin, layout in zip(row.group_starts, layouts)]
        media_index = np.concatenate(media)
        hidden = self.decode(
            torch.from_numpy(ids).to(self.device),
            torch.from_numpy(positions).to(self.device),
            context,
            states=linear_attention.row_states(self.decoder, row, self.device, keep),
            media_index=media_index,
            media=None if features is None or not len(media_index) else features.gather(prompts),
        )
        return hidden.index_select(0, torch.from_numpy(row.predictor_index).to(self.device))

    def decode(
        self,
        ids: Tensor,  # (S,)
        positions: Tensor,  # (3, S)
        context: attention.AttentionContext,
        *,
        states: linear_attention.StateContext | None = None,
        media_index: np.ndarray | None = None,  # (F,) ascending
        media: tuple[Tensor, ...] | None = None,  # each (F, H)
    ) -> Tensor:
        """Run the text decoder over one packed row and return its last hidden states (S, H)."""
        attention.install(self.decoder)  # again, in case the model got another implementation since
        embeds = self.embedding(ids)
        options = {}
        if media is not None:
            assert media_index is not None
            index = torch.from_numpy(media_index).to(embeds.device)
            embeds = embeds.index_copy(0, index, media[0].to(embeds.dtype))
            if len(media) > 1:
                options = {"visual_pos_masks": index, "deepstack_visual_embeds": list(media[1:])}
        output = self.decoder(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None] if self.position_axes == 3 else positions[:1],
            attention_mask=embeds.new_zeros(attention.UNUSED_MASK_SHAPE),
            use_cache=False,
            shared_prefix=context,
            shared_states=states,
            **options,
        )
        return output.last_hidden_state[0]

    def response_logps(
        self,
        prompts: Sequence[EncodedPrompt],
        token_ids: Tensor,  # (B, T)
        lengths: Tensor,  # (B,)
        *,
        temperature: float = 1.0,
        group_sizes: Sequence[int] | Tensor | None = None,
        features: MediaFeatures | None = None,
        return_entropy: bool = False,
        chunk_size: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities of the response tokens.

        Args:
            prompts: As for `response_hidden`, like `token_ids`, `lengths`, `group_sizes` and `features`.
            temperature: Softmax temperature.
            return_entropy: Also return the entropy of each token's distribution.
            chunk_size: Tokens whose logits are held at once; with more tokens, logits are recomputed in the backward
                pass.

        Returns:
            Float32 (M,), packed as in `response_hidden`; with `return_entropy`, a pair of such tensors.
        """
        hidden = self.response_hidden(prompts, token_ids, lengths, group_sizes=group_sizes, features=features)
        host_ids, host_lengths = (x.numpy(force=True) for x in (token_ids, lengths))
        targets = host_ids[np.arange(host_ids.shape[1]) < host_lengths[:, None]]
        return token_logps(
            hidden,
            self.head_weight,
            torch.from_numpy(targets).to(hidden.device),
            bias=self.head_bias,
            temperature=temperature,
            return_entropy=return_entropy,
            chunk_size=chunk_size,
            validate=False,
        )

    @property
    def has_adapter(self) -> bool:
        """Whether the model is wrapped by peft, so that switching the adapter off gives the reference."""
        return hasattr(self.model, "disable_adapter")

    def freeze_reference(self, *, copy: bool = False) -> None:
        """Make the present weights the reference.

        It keeps a copy of the trained weights, which replaces them while the reference runs. It keeps nothing if
        switching off a LoRA adapter that is still new gives the same.

        Args:
            copy: Keep one even then: captured CUDA graphs know weights by their address and ignore switches.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._reference = None
        if copy or not (self.has_adapter and is_new_lora(trained)):
            self._reference = copies_of(trained)

    @torch.no_grad()
    def reference_logps(
        self,
        prompts: Sequence[EncodedPrompt],
        token_ids: Tensor,  # (B, T)
        lengths: Tensor,  # (B,)
        *,
        temperature: float = 1.0,
        group_sizes: Sequence[int] | Tensor | None = None,
        features: MediaFeatures | None = None,
    ) -> Tensor:
        """Log-probabilities (M,) under the reference: the weights of `freeze_reference`, or the model with its adapter
        off if none were kept.

        Args:
            features: Features of the policy's tower; used only if the reference has the same tower.

        Raises:
            RuntimeError: There is no adapter and `freeze_reference` was not called.
        """
        if self._reference is None and not self.has_adapter:
            raise RuntimeError("reference_logps: call freeze_reference() where the policy starts")
        own_tower = self.shared_prefix and self.vision.trains
        with self.evaluating(), self.reference_weights():
            if own_tower:
                features = VisionEncoder(self.vision.tower, 0, self.vision.family)(prompts)
            logps = self.response_logps(
                prompts,
                token_ids,
                lengths,
                temperature=temperature,
                group_sizes=group_sizes,
                features=features,
            )
        assert isinstance(logps, Tensor)
        return logps

    @contextlib.contextmanager
    def reference_weights(self) -> Iterator[None]:
        """The model with the weights of the reference; a sharded one is gathered, so all processes enter together."""
        if self._reference is None:
            with self.gathered(), self.model.disable_adapter():
                yield
            return
        with exchanged(self._reference), self.gathered():
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode (no dropout); each module's previous mode is restored afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
