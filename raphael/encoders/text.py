"""Prompts -> what the denoiser's cross-attention reads: one vector per token, which tokens are real, one pooled vector.

Three kinds behind one class: open_clip's text tower (also the one trained here), transformers' CLIPTextModel and
T5EncoderModel. Everything after `tokenize` needs the token ids alone, so that records store ids and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raphael.base.config.params import NO_TEXT
from raphael.encoders.clip import MAX_CHARS, OpenClip, is_clip_folder, load_clip_folder, load_open_clip
from raphael.encoders.pretrained import PretrainedError, follow, one_line, pointed_facts, split_revision

T5_CONTEXT = 77  # T5 knows no longest text; the denoiser's context is CLIP's unless told otherwise
START, END, PAD = "<start>", "<end>", "<pad>"
SPECS = "a folder like models/clip, open_clip:<arch>:<weights>, clip:<folder or hub id> or t5:<folder or hub id>"


class TextEncoding(NamedTuple):
    context: Tensor  # float32 (B,N,dim), after the final norm
    mask: Tensor  # bool (B,N), True on real tokens, those that open and close the text included
    pooled: Tensor  # float32 (B,D)


class TextEncoder(nn.Module):
    """context_length N, dim. `tokenize`, `encode`, `tokens_of`; never trained from here."""

    context_length: int
    dim: int
    kind: str
    commit: str | None = None  # of the hub's repository that it was loaded from

    def tokenize(self, texts: list[str]) -> Tensor:
        """-> int64 (B,N); longer texts are cut, the closing token kept."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, token_ids: Tensor) -> TextEncoding:
        """token_ids: whole numbers (B,N), of any integer type. Raises ValueError on another length."""
        if token_ids.ndim != 2 or token_ids.shape[1] != self.context_length:
            raise ValueError(f"token ids: got {tuple(token_ids.shape)}, expected (B, {self.context_length})")
        with torch.autocast(token_ids.device.type, enabled=False):
            return self._encode(token_ids.long())

    def mask_of(self, token_ids: Tensor) -> Tensor:
        """Bool (B,N), True on real tokens: as `encode` says it, without encoding."""
        return self._mask(token_ids)

    def tokens_of(self, prompt: str) -> list[str]:
        """The word piece at each of the N positions, for display; blanks stripped."""
        (ids,) = self.tokenize([prompt])
        real = int(self._mask(ids[None]).sum())
        return [self._piece(int(token)) for token in ids[:real]] + [PAD] * (self.context_length - real)

    opening = 1  # tokens before the text's own: CLIP's opening one
    closing = 1

    @property
    def room(self) -> int:
        """How many tokens of a text are read: the context without the opening and the closing one."""
        return self.context_length - self.opening - self.closing

    def pieces(self, text: str) -> list[int]:
        """The token ids of a text of any length, without those that open and close it."""
        raise NotImplementedError

    def text_of(self, token_ids: list[int]) -> str:
        raise NotImplementedError

    def sentence(self, token_ids: list[int]) -> Tensor:
        """At most `room` ids, opened, closed and padded as `tokenize` does it: int64 (N,)."""
        (padded,) = self.tokenize([""])
        closed = int(self._mask(padded[None]).sum())  # of the empty text: what opens and closes
        after = padded[closed:].clone()
        own = torch.tensor(token_ids, dtype=padded.dtype)
        whole = torch.cat([padded[: self.opening], own, padded[self.opening : closed], after])
        return whole[: self.context_length]

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "context_length": self.context_length, "dim": self.dim}

    def _encode(self, token_ids: Tensor) -> TextEncoding:
        raise NotImplementedError

    def _mask(self, token_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _piece(self, token: int) -> str:
        raise NotImplementedError


def up_to_first(token_ids: Tensor, closing: int) -> Tensor:
    """Bool (B,N): the positions up to the first closing token, included. Padding may be that token, or a word's id."""
    is_closing = (token_ids == closing).long()
    return is_closing.cumsum(dim=1) - is_closing == 0


class OpenClipText(TextEncoder):
    """open_clip's text tower, from the embedding to ln_final; attention stays causal, as trained."""

    kind = "open_clip"

    def __init__(self, clip: OpenClip):
        super().__init__()
        self.tokenizer, self.context_length = clip.tokenizer, clip.context_length
        if not hasattr(self.tokenizer, "eot_token_id"):
            raise PretrainedError("open_clip: this architecture's tokenizer is not CLIP's own; load it by clip: or t5:")
        model = getattr(clip.model, "text", clip.model)  # CustomTextCLIP keeps its tower in .text
        self.token_embedding, self.transformer, self.ln_final = model.token_embedding, model.transformer, model.ln_final
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)
        self.dim = int(self.ln_final.weight.shape[0])

    def tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer([text[:MAX_CHARS] for text in texts], context_length=self.context_length)

    def _encode(self, token_ids: Tensor) -> TextEncoding:
        length = self.context_length
        x = self.token_embedding(token_ids) + self.positional_embedding[:length]  # (B,N,dim)
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        context = self.ln_final(x)
        last = (token_ids == self.tokenizer.eot_token_id).int().argmax(dim=1)  # (B,)
        pooled = context[torch.arange(len(context), device=context.device), last]  # (B,dim)
        if isinstance(self.text_projection, nn.Linear):
            pooled = self.text_projection(pooled)
        elif self.text_projection is not None:
            pooled = pooled @ self.text_projection  # (B,D)
        return TextEncoding(context.float(), self._mask(token_ids), pooled.float())

    def _mask(self, token_ids: Tensor) -> Tensor:
        return up_to_first(token_ids, self.tokenizer.eot_token_id)

    def pieces(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def text_of(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids).strip()

    def _piece(self, token: int) -> str:
        special = {self.tokenizer.sot_token_id: START, self.tokenizer.eot_token_id: END}
        return special.get(token) or self.tokenizer.decode([token]).strip()


class TransformersText(TextEncoder):
    """transformers' CLIPTextModel ("clip") or T5EncoderModel ("t5") with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, kind: str, context_length: int, commit: str | None = None):
        super().__init__()
        self.model, self.tokenizer, self.kind, self.context_length = model, tokenizer, kind, context_length
        self.commit = commit
        self.dim = int(model.config.d_model if kind == "t5" else model.config.hidden_size)
        self.opening = 0 if kind == "t5" else 1

    def tokenize(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(
            [text[:MAX_CHARS] for text in texts],
            padding="max_length",
            max_length=self.context_length,
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"].long()

    def _encode(self, token_ids: Tensor) -> TextEncoding:
        mask = self._mask(token_ids)
        if self.kind == "t5":
            context = self.model(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state.float()
            weights = mask[..., None].float()
            return TextEncoding(context, mask, (context * weights).sum(dim=1) / weights.sum(dim=1))
        # No mask: attention is causal, what follows the closing token changes nothing before it (as in SD)
        context = self.model(input_ids=token_ids).last_hidden_state.float()
        last = mask.sum(dim=1) - 1
        return TextEncoding(context, mask, context[torch.arange(len(context), device=context.device), last])

    def _mask(self, token_ids: Tensor) -> Tensor:
        return up_to_first(token_ids, self.tokenizer.eos_token_id)

    def pieces(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text_of(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids).strip()

    def _piece(self, token: int) -> str:
        if token == self.tokenizer.eos_token_id:
            return END
        if token == self.tokenizer.bos_token_id:
            return START
        return self.tokenizer.convert_ids_to_tokens(token).replace("</w>", "").replace("\u2581", "").strip()


def load_text_encoder(spec_or_folder: str | Path, context_length: int | None = None) -> TextEncoder:
    """The encoder in evaluation mode, frozen, on the CPU, in float32. Raises PretrainedError, one line.

    spec_or_folder: models/clip or another folder of that form, a pointer folder, "open_clip:<arch>:<weights>",
    "clip:<folder or hub id>", "t5:<folder or hub id>". context_length: of "t5:" (default 77) and to shorten "clip:".
    """
    context_length = context_length or pointed_facts(spec_or_folder).get("context_length")
    spec = follow(spec_or_folder)
    if spec == NO_TEXT:
        raise PretrainedError("the text encoder: got none, as clip.pretrained says; name one there and run clip again")
    kind, _, rest = spec.partition(":")
    if kind == "open_clip" and rest:
        arch, _, weights = rest.partition(":")
        encoder: TextEncoder = OpenClipText(load_open_clip(arch, weights, context_length))
    elif kind in ("clip", "t5") and rest:
        encoder = _load_transformers(kind, rest, context_length)
    elif is_clip_folder(spec):
        encoder = OpenClipText(load_clip_folder(spec, text_only=True))
    else:
        raise PretrainedError(f"the text encoder: got {spec!r}, which has no config.json of ours; expected {SPECS}")
    return encoder.eval().requires_grad_(False)


def _load_transformers(kind: str, where: str, context_length: int | None) -> TextEncoder:
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel

    local = Path(where).expanduser()
    where, revision = split_revision(where)
    target, local_only = (str(local), True) if local.is_dir() else (where, False)
    # Without trust_remote_code=False a folder with `auto_map` asks whether to run its code
    safely: dict[str, Any] = {"local_files_only": local_only, "revision": revision, "trust_remote_code": False}
    with one_line(f"the text encoder {kind}", where, "config.json, model.safetensors and the tokenizer's files"):
        if kind == "t5" and (found := AutoConfig.from_pretrained(target, **safely).model_type) != "t5":
            # transformers would find none of its weights there, and draw its own
            raise PretrainedError(f"the text encoder t5: got {where}, a model of type {found}, expected a T5")
        tokenizer = AutoTokenizer.from_pretrained(target, **safely)
        model = (T5EncoderModel if kind == "t5" else CLIPTextModel).from_pretrained(
            target, use_safetensors=True, dtype=torch.float32, **safely
        )
    commit = getattr(model.config, "_commit_hash", None)  # None of a folder
    longest = T5_CONTEXT if kind == "t5" else model.config.max_position_embeddings
    if kind == "clip" and context_length and context_length > longest:
        raise PretrainedError(f"the text encoder clip: got context_length {context_length}, expected at most {longest}")
    return TransformersText(model, tokenizer, kind, context_length or longest, commit)
