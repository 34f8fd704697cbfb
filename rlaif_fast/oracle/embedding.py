"""Ranks by how close a response is in meaning to the reference answer, by sentence embeddings."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.errors import UsageError, first_line, needed_by
from rlaif_fast.oracle.base import Ranking, RankRequest, unranked
from rlaif_fast.oracle.choices import parse_choice
from rlaif_fast.oracle.extract import final_part
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.identity import model_digest
from rlaif_fast.oracle.option_types import check_least
from rlaif_fast.oracle.positions import learned_positions
from rlaif_fast.oracle.scoring import normalise
from rlaif_fast.oracle.untrusted import show_responses

_TIE = 1e-4  # how much padding to another batch changes a float32 cosine


class EmbeddingOracle:
    """Ranks by the cosine of sentence embeddings, clipped to [0, 1]; an exact answer scores 1.

    A letter of a multiple-choice answer is replaced by its option's text. Embeddings measure similarity of
    topic more than truth ("left" and "right" are close), so check `oracle/reference_tau` before trusting one.
    A text with more tokens than the encoder takes is embedded in pieces, whose mean is used.

    Args:
        model: A folder with a transformers encoder (its `1_Pooling/config.json`, if any, is
            obeyed), the name of an installed package that holds such a folder, or a hub name.
        device: "auto", "cpu", "cuda", ...
        batch_size: Texts in one forward pass.
        max_response_chars: Length a response is cut to, in the middle; longer if two would otherwise look the same.
    """

    name = "embedding"
    gives_scores = True
    needs_reference = True

    def __init__(
        self, *, model: str, device: str = "auto", batch_size: int = 64, max_response_chars: int = 2000
    ) -> None:
        check_least(1, batch_size=batch_size, max_response_chars=max_response_chars)
        with needed_by("the embedding oracle", "train"):
            from transformers import AutoModel, AutoTokenizer

            from rlaif_fast.policy.loading import resolve_device
            from rlaif_fast.policy.weights import load_whole

        folder = resolve_model(model)
        self.model_name = model
        self._folder = folder
        self.batch_size = batch_size
        self.max_response_chars = max_response_chars
        place = resolve_device(device)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            what = f"oracle option 'model': {model!r}"
            found = load_whole(AutoModel, folder, what, unread="pooler", dtype=torch.float32)
            self._model = found.eval().to(place)
            self._use_first, most = _pooling(folder)
            self._max_tokens = min(most, learned_positions(self._model) or most)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"oracle option 'model': cannot load an encoder from {model!r}: {first_line(error)}"
            ) from None
        if not self._tokenizer.is_fast:
            raise UsageError(
                f"oracle option 'model': {model!r} has no fast tokenizer (tokenizer.json), which texts longer than "
                "the encoder takes need"
            )

    @cached_property
    def _weights(self) -> str:
        return model_digest(self._folder, getattr(self._model.config, "_commit_hash", None))

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        return (
            f"embedding/5 model={self.model_name} weights={self._weights} max_chars={self.max_response_chars}"
        )

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        start = time.perf_counter()
        scored = self._score_all(requests)
        seconds = (time.perf_counter() - start) / max(1, len(requests))
        rankings = []
        for request, scores in zip(requests, scored):
            if scores is None:
                reason = f"request {request.id!r} has no reference answer; the embedding oracle needs one"
                rankings.append(unranked(request, reason))
            elif any(map(math.isnan, scores)):
                rankings.append(unranked(request, "the encoder gave NaN", seconds=seconds))
            else:
                verdicts = tuple(round(score, 6) for score in scores)
                ranks = ranks_from_scores(scores, _TIE)
                rankings.append(Ranking(ranks, scores=scores, verdicts=verdicts, seconds=seconds))
        return rankings

    def _score_all(self, requests: Sequence[RankRequest]) -> list[tuple[float, ...] | None]:
        plain = [self._texts(request) for request in requests]
        texts = sorted({text for group in plain if group for text in group})
        embeddings = dict(zip(texts, self._embed(texts)))
        scored: list[tuple[float, ...] | None] = []
        for group in plain:
            if group is None:
                scored.append(None)
                continue
            reference, *responses = group
            scores = []
            for text in responses:
                if text == reference or not text:
                    scores.append(float(text == reference))
                else:
                    scores.append(float((embeddings[text] @ embeddings[reference]).clamp(0.0, 1.0)))
            scored.append(tuple(scores))
        return scored

    def _texts(self, request: RankRequest) -> list[str] | None:
        """The reference, then the responses, as they are compared; None without a reference."""
        if request.reference is None or not request.reference.strip():
            return None
        plain = []
        # after the reasoning, if any
        answers = [final_part(text) or "" for text in request.responses]
        for text in (request.reference, *answers):
            option = parse_choice(text, request.options) if request.options else None
            plain.append(text if option is None else request.options[option])
        shown, places = show_responses(plain, self.max_response_chars)
        return [normalise(shown[place]) for place in places]

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> list[Tensor]:
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        embeddings: dict[int, Tensor] = {}
        for start in range(0, len(texts), self.batch_size):
            part = by_length[start : start + self.batch_size]
            batch = self._tokenizer(
                [texts[i] for i in part],
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_overflowing_tokens=True,  # overflow becomes another piece
                return_tensors="pt",
            ).to(self._model.device)
            owner = batch.pop("overflow_to_sample_mapping")  # (pieces,)
            hidden = self._model(**batch).last_hidden_state  # (pieces, t, H)
            mask = batch["attention_mask"].to(hidden.dtype)  # (pieces, t)
            if self._use_first:
                mask = torch.zeros_like(mask).index_fill_(1, torch.tensor(0, device=mask.device), 1.0)
            total = hidden.new_zeros(len(part), hidden.shape[-1])
            total.index_add_(0, owner, (hidden * mask[..., None]).sum(1))
            # After normalising, a sum equals a mean.
            embeddings.update(zip(part, torch.nn.functional.normalize(total, dim=-1).cpu()))
        return [embeddings[i] for i in range(len(texts))]


def resolve_model(model: str) -> str:
    """The folder that `model` names, or the one in an installed package of that name; else `model` itself."""
    if Path(model).is_dir():
        return model
    name = model.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    for root in (spec and spec.submodule_search_locations) or []:
        found = sorted(Path(root).glob("**/config.json"), key=lambda path: len(path.parts))
        for config in found:
            if "model_type" in json.loads(config.read_text()):
                return str(config.parent)
    return model


def _pooling(folder: str) -> tuple[bool, int]:
    """Whether the first token represents the sentence (else the mean does), and the most tokens of a text.

    Raises:
        UsageError: The sentence encoder pools its tokens in some other way.
    """
    modules = [(m["type"].rpartition(".")[2], m["path"]) for m in _settings(folder, "modules.json", [])]
    others = [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise UsageError(
            f"oracle option 'model': {folder!r} ends in {', '.join(others)}, which is not computed"
        )
    place = next((path for kind, path in modules if kind == "Pooling"), "1_Pooling")
    pooling = _settings(folder, f"{place}/config.json", {})
    modes = {
        key.removeprefix("pooling_mode_") for key, on in pooling.items() if on is True and "_mode_" in key
    }
    named = pooling.get("pooling_mode", ())
    modes |= {named} if isinstance(named, str) else set(named)
    modes = {mode.removesuffix("_tokens").removesuffix("_token") for mode in modes}
    if len(modes) > 1 or modes - {"cls", "mean", "mean_sqrt_len"}:  # normalised, the last two are equal
        raise UsageError(
            f"oracle option 'model': {folder!r} pools by {' and '.join(sorted(modes))}; expected mean or cls"
        )
    prompt = _settings(folder, "config_sentence_transformers.json", {}).get("default_prompt_name")
    if prompt is not None:
        raise UsageError(
            f"oracle option 'model': {folder!r} puts its prompt {prompt!r} first, which is not done"
        )
    max_tokens = _settings(folder, "sentence_bert_config.json", {}).get("max_seq_length")
    return modes == {"cls"}, max_tokens or 512


def _settings(folder: str, name: str, default: Any) -> Any:
    """A JSON file beside the weights, in a folder or on the hub; `default` if there is none."""
    from transformers.utils.hub import cached_file

    path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return default if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
