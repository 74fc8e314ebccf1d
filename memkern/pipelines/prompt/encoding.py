"""One encoding: the text-encoder calls between the start and the end of `encode_prompt`, as they were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ...policy import Policy
from ...roles import Role, empty_roles, padding_positions, token_roles
from ..family.encoders import EncoderCall, Slot, Vocabulary


class Encoding:
    """Collects the calls of a pipeline's tokenizers and text encoders.

    Args:
        pipe: the pipeline.
        own: its text encoders.
        policy: that of the request, for messages.
        pad_with: the token that pads are swapped for; None leaves them.

    Attributes:
        calls: the text-encoder calls, in order.
        context_length: tokens in a window.
    """

    def __init__(self, pipe: Any, own: Sequence[Slot], policy: Policy, pad_with: str | None) -> None:
        self.calls: list[EncoderCall] = []
        self._tokenized: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._slots: dict[Any, Slot] = {slot.embeddings(pipe): slot for slot in own}
        self._words: dict[Slot, tuple[Vocabulary, int | None]] = {
            slot: (slot.vocabulary(pipe), slot.token_id(pipe, policy, pad_with)) for slot in own
        }
        self.context_length = min((words.context_length for words, _ in self._words.values()), default=0)

    def slot_of(self, embeddings: Any) -> Slot | None:
        """The encoder that has this embedding layer; None if it is no encoder of this pipeline."""
        return self._slots.get(embeddings)

    def observe(self, slot: Slot, input_ids: torch.Tensor) -> torch.Tensor:
        """Record a call and return the ids to embed: `input_ids` `[…, L]`, padding swapped if there is a `pad_with`.

        This copies the ids to the host: one sync per text-encoder call, none in the denoising loop.
        """
        ids = input_ids.detach().reshape(-1, input_ids.shape[-1]).to("cpu", torch.int64)
        words, pad_with = self._words[slot]
        roles = token_roles(ids, eos_token_id=words.eos_token_id, context_length=words.context_length)
        if pad_with is None or pad_with == words.pad_token_id:
            self.calls.append(EncoderCall(slot, roles, torch.zeros_like(roles, dtype=torch.bool)))
            return input_ids
        padding = padding_positions(
            ids,
            roles,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            attention_mask=self._attention_mask(ids),
            context_length=words.context_length,
        )
        self.calls.append(EncoderCall(slot, roles, padding))
        return input_ids.masked_fill(padding.reshape(input_ids.shape).to(input_ids.device), pad_with)

    def tokenized(self, output: Any) -> None:
        """Note the ids and the attention mask that a tokenizer made."""
        ids, mask = output.get("input_ids"), output.get("attention_mask")
        if isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor):
            self._tokenized.append((ids, mask))

    def last(self, slot: Slot, windows: int) -> EncoderCall:
        """The last call of an encoder; for several windows, all its calls as one.

        Raises:
            ValueError: it was not called, or not once for each window.
        """
        calls = [call for call in self.calls if call.slot == slot]
        if not calls:
            raise ValueError(f"embeds: {slot.encoder} has not been called inside patch.encoding")
        if windows <= 1 or calls[-1].roles.shape[1] == windows * self._words[slot][0].context_length:
            return calls[-1]
        if len(calls) != windows or len({call.roles.shape for call in calls}) > 1:
            raise ValueError(
                f"embeds: {windows} windows, and {slot.encoder} was called {len(calls)} times, so it is not known "
                "which call made which; say which ids they are of: edited(embeds, input_ids)"
            )
        roles, swapped = (torch.cat([getattr(call, name) for call in calls], 1) for name in ("roles", "swapped"))
        return EncoderCall(slot, roles, swapped)

    def given(self, slot: Slot, input_ids: torch.Tensor, windows: int) -> EncoderCall:
        """The call of an encoder for ids `[B, L]`, of `windows` windows; those after the ids are an empty prompt's."""
        words, pad_with = self._words[slot]
        ids = input_ids.detach().to("cpu", torch.int64)
        roles = token_roles(ids, eos_token_id=words.eos_token_id, context_length=words.context_length)
        more = [empty_roles(len(ids), words.context_length)] * (windows - ids.shape[1] // words.context_length)
        roles = torch.cat([roles, *more], 1)
        swapped = pad_with is not None and pad_with != words.pad_token_id
        return EncoderCall(slot, roles, (roles == Role.PAD) & swapped)

    def _attention_mask(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The tokenizer's mask of exactly these ids, from its last call that made them."""
        for made, mask in reversed(self._tokenized):
            if torch.equal(made, ids):
                return mask
        return None


class ObservedTokenizer:
    """Stands in for a tokenizer during one `encode_prompt`, to note the attention masks that it returns.

    Pipelines drop that mask, and the ids alone cannot tell a literal `<|endoftext|>` that ends a prompt from
    padding. The tokenizer itself is not touched.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self._tokenizer = tokenizer
        self._encoding = encoding

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._tokenizer(*args, **kwargs)
        self._encoding.tokenized(output)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


_ENCODING: ContextVar[Encoding | None] = ContextVar("memkern_encoding", default=None)


def current() -> Encoding | None:
    """The encoding that this context is in."""
    return _ENCODING.get()


@contextmanager
def entered(encoding: Encoding) -> Iterator[Encoding]:
    """Make `encoding` the current one."""
    token = _ENCODING.set(encoding)
    try:
        yield encoding
    finally:
        _ENCODING.reset(token)
