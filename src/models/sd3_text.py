"""Stable Diffusion 3's prompts and latents: each part is read when it is used, and let go at once.

T5 is read layer by layer, so that the largest of all parts needs the least memory.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from ..store import read_json
from .pipeline import Conditioning
from .sd3 import (
    TEXT_BITS,
    WIDTH,
    Reading,
    check_ids,
    clip_tokenizer,
    read_encoder,
    t5_tokenizer,
    t5_tokens,
    vae_decoder,
)
from .sd3_decode import decode_in_strips
from .sd3_download import download_part, download_tokenizer
from .sd3_files import PARTS, TOKENIZERS, Files, Location
from .sd3_names import CLIP_HEAD, ClipShape, T5Shape, clip_tensors, t5_tensors
from .sd3_versions import check_packages

CLIP_TOKENS, T5_TOKENS = 77, 512  # DiffusionKit's, for equal pictures
SIDE = 8  # pixels of a picture to one of the latent
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609
ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
POOLED, LATENT_CHANNELS = 2048, 16  # of every published model


@dataclass(frozen=True)
class Text:
    """How prompts are read."""

    t5: bool | None = None  # none: as the model has it
    bits: int | None = None  # none: 16

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in TEXT_BITS:
            raise UserError(
                f"--quantize-text-encoders {self.bits} is not possible; valid: "
                f"{' or '.join(map(str, TEXT_BITS))}"
            )


def encoder_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Encoders and VAE were published in float16, whose precision bfloat16 would lose."""
    return mx.float32 if dtype == mx.float32 else mx.float16


class SD3TextEncoder:
    """Prompts to what the transformer takes: CLIP-L and CLIP-G side by side, then T5's tokens.

    Equal prompts, such as the empty negative ones, are encoded once.
    """

    def __init__(self, files: Files, dtype: mx.Dtype, text: Text, pooled_dim: int = POOLED) -> None:
        self.files, self.dtype, self._pooled = files, dtype, pooled_widths(pooled_dim)
        self.text = replace(text, t5=text.t5 is not False)
        self._reported = text.bits is None

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        return self.each([prompts])[0]

    def each(self, batches: Sequence[Sequence[str]]) -> list[Conditioning]:
        """Of every batch, as if it were the only one: CLIP rounds a batch as a whole."""
        check_packages()
        uniques = [list(dict.fromkeys(prompts)) for prompts in batches]
        errors: dict[str, float] = {}
        clip = self._clip(uniques, errors)
        long = self._t5(list(dict.fromkeys(sum(uniques, []))), errors) if self.text.t5 else {}
        results = [
            self._joined(prompts, unique, *found, long)
            for prompts, unique, found in zip(batches, uniques, clip, strict=True)
        ]
        release()
        self._report(errors)
        return results

    def _joined(
        self,
        prompts: Sequence[str],
        unique: Sequence[str],
        hidden: mx.array,
        pooled: mx.array,
        long: Mapping[str, mx.array],
    ) -> Conditioning:
        """Of one batch: what both CLIPs make of its unique prompts, and T5 of each prompt."""
        text = mx.pad(hidden, [(0, 0), (0, 0), (0, WIDTH - hidden.shape[-1])])
        # As many zeros as CLIP has tokens are DiffusionKit's stand-in for T5.
        more = mx.concatenate([long[p] for p in unique]) if long else mx.zeros_like(text)
        text = mx.concatenate([text, more.astype(text.dtype)], axis=1).astype(self.dtype)
        rows = mx.array([unique.index(prompt) for prompt in prompts])
        result = Conditioning(text[rows], pooled.astype(self.dtype)[rows])
        mx.eval(result.text, result.pooled)
        return result

    def tokens(self) -> int:
        long = self._t5_length(self.tokenizer("t5")) if self.text.t5 else CLIP_TOKENS
        return CLIP_TOKENS + long

    def check(self, prompts: Sequence[str]) -> None:
        check_packages()
        tokenizers = {name: self._clip_tokenizer(name) for name in ACTIVATIONS}
        for tokenizer in tokenizers.values():
            clip_tokens(tokenizer, prompts)
        for name, tokenizer in tokenizers.items():
            _, _, shape = read_encoder(self.location(name), clip_tensors, ClipShape)
            self._check_clip(name, shape, tokenizer)
        if self.text.t5:
            _, _, shape = read_encoder(self.location("t5"), t5_tensors, T5Shape)
            self._t5_tokenizer(shape)

    def settings(self) -> dict[str, Any]:
        return {"text_encoders": {"t5": self.text.t5, "bits": self.text.bits or 16}}

    def parts(self) -> tuple[str, ...]:
        """Names of the encoders in use."""
        return ("clip_l", "clip_g", "t5") if self.text.t5 else ("clip_l", "clip_g")

    def location(self, name: str) -> Location:
        if found := self.files.part(name):
            return found
        if self.files.asked is None:
            return download_part(name)
        raise self.files.missing(name, PARTS[name].places, PARTS[name].title)

    def tokenizer(self, name: str) -> Path:
        if found := self.files.tokenizer(name):
            return found
        if self.files.asked is None:
            return download_tokenizer(name)
        raise self.files.missing(name, TOKENIZERS[name][0][:1], f"tokenizer of {name}")

    def _clip(
        self, batches: Sequence[Sequence[str]], errors: dict[str, float]
    ) -> list[tuple[mx.array, mx.array]]:
        """Hidden states and pooled text of both CLIPs, joined, of every batch."""
        hidden: list[list[mx.array]] = [[] for _ in batches]
        pooled: list[list[mx.array]] = [[] for _ in batches]
        for name in ACTIVATIONS:
            tokenizer = self._clip_tokenizer(name)
            with Reading(self.location(name), encoder_dtype(self.dtype)) as reading:
                model = reading.clip(ACTIVATIONS[name])
                self._check_clip(name, reading.shape, tokenizer)
                tokens = [mx.array(clip_tokens(tokenizer, prompts)) for prompts in batches]
                compared = self._compares(reading)
                if compared:
                    plain = model(tokens[0][:1]).hidden_states[-2]
                    mx.eval(plain)
                reading.quantize(model, self.text.bits)
                mx.eval(model.parameters())
                for index, batch in enumerate(tokens):
                    out = model(batch)
                    mx.eval(out.hidden_states[-2], out.pooled_output)
                    hidden[index].append(out.hidden_states[-2])
                    pooled[index].append(out.pooled_output)
                    del out
                if compared:
                    errors[PARTS[name].title] = relative_error(hidden[0][-1][:1], plain)
            del model, reading
            release()
        joined = [[mx.concatenate(parts, axis=-1) for parts in kind] for kind in (hidden, pooled)]
        return list(zip(*joined, strict=True))

    def _compares(self, reading: Reading) -> bool:
        """Whether the first prompt is encoded both ways; what is stored quantized has one only."""
        return self.text.bits is not None and reading.bits is None and not self._reported

    def _clip_tokenizer(self, name: str) -> Any:
        return clip_tokenizer(self.tokenizer(name), pad_with_eos=name == "clip_l")

    def _check_clip(self, name: str, shape: ClipShape, tokenizer: Any) -> None:
        """Raises for the encoder of another place or model, and for tokens that it has not."""
        path, found = self.location(name).path, shape.projection or shape.width
        if found != self._pooled[name]:
            title = PARTS[name].title
            raise UserError(
                f"{path}: its pooled text has {found} values, that of the model's {title} "
                f"{self._pooled[name]}; put the file of that {title} there"
            )
        vocabulary = self.tokenizer(name) / "vocab.json"
        check_ids(vocabulary, tokenizer.vocab.values(), path, shape.vocabulary)

    def _t5_tokenizer(self, shape: T5Shape) -> Any:
        """The tokenizer, all of whose tokens the encoder has."""
        folder = self.tokenizer("t5")
        tokenizer = t5_tokenizer(folder, self._t5_length(folder))
        ids, path = tokenizer.get_vocab().values(), self.location("t5").path
        check_ids(folder, ids, path, shape.vocabulary)
        return tokenizer

    def _t5_length(self, folder: Path) -> int:
        """Tokens of a prompt: what the tokenizer's own settings say, at most DiffusionKit's."""
        settings, length = folder / "tokenizer_config.json", T5_TOKENS
        if settings.is_file():
            length = read_json(settings).get("model_max_length")
        return length if isinstance(length, int) and 0 < length < T5_TOKENS else T5_TOKENS

    def _t5(self, prompts: Sequence[str], errors: dict[str, float]) -> dict[str, mx.array]:
        """(1, tokens, 4096) of every prompt; each layer is read, used for all, and let go."""
        length = self._t5_length(self.tokenizer("t5"))
        with Reading(self.location("t5"), encoder_dtype(self.dtype)) as reading:
            stages = reading.t5_stages(length)
            embed = next(stages)
            tokens = t5_tokens(self._t5_tokenizer(reading.shape), prompts, length)
            states = [embed(mx.array(row)[None]) for row in tokens]
            mx.eval(states)
            plain = states[0] if self._compares(reading) else None
            for stage in stages:
                if plain is not None:
                    plain = stage(plain)
                    mx.eval(plain)
                reading.quantize(stage.layer, self.text.bits)
                mx.eval(stage.layer.parameters())
                for row in range(len(states)):
                    states[row] = stage(states[row])
                    mx.eval(states[row])
                del stage
                mx.clear_cache()
            if plain is not None:
                errors[PARTS["t5"].title] = relative_error(states[0], plain)
        return dict(zip(prompts, states, strict=True))

    def _report(self, errors: Mapping[str, float]) -> None:
        if errors and not self._reported:
            listed = ", ".join(f"{title} {error:.1%}" for title, error in errors.items())
            click.echo(f"text encoders at {self.text.bits} bits, relative error: {listed}")
            self._reported = True


class SD3Codec:
    """Latents to pictures; the decoder is read for each call and let go."""

    side = SIDE

    def __init__(
        self, files: Files, dtype: mx.Dtype, latent_channels: int = LATENT_CHANNELS
    ) -> None:
        self.files, self.dtype = files, encoder_dtype(dtype)
        self._latent_channels = latent_channels

    def decode(self, latent: mx.array) -> mx.array:
        """One picture after the other, each in strips."""
        decoder, pictures = self._decoder(), []
        latent = (latent / LATENT_SCALE + LATENT_SHIFT).astype(self.dtype)
        for i in range(len(latent)):
            picture = decode_in_strips(decoder, latent[i : i + 1]) / 2 + 0.5
            mx.eval(picture)
            pictures.append(picture)
        del decoder
        release()
        return mx.concatenate(pictures)

    def check(self) -> None:
        self._decoder()

    def _decoder(self) -> nn.Module:
        check_packages()
        return vae_decoder(self.location(), self.dtype, self._latent_channels)

    def location(self) -> Location:
        if found := self.files.part("vae"):
            return found
        raise self.files.missing("vae", PARTS["vae"].places, PARTS["vae"].title)


def pooled_widths(pooled_dim: int) -> dict[str, int]:
    """How many values of the pooled text each CLIP gives: of the published 2048 CLIP-L gives 768,
    three eighths, and of smaller models as many whole heads."""
    of_l = pooled_dim // CLIP_HEAD * 3 // 8 * CLIP_HEAD
    return {"clip_l": of_l, "clip_g": pooled_dim - of_l}


def clip_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Of every prompt, padded to equal length."""
    padding = tokenizer.eos_token if tokenizer.pad_with_eos else 0
    rows = []
    for prompt in prompts:
        try:
            row = tokenizer.tokenize(prompt)
        except KeyError as error:
            raise UserError(
                f"prompt {prompt!r}: DiffusionKit's tokenizer does not know "
                f"{error.args[0]!r}; write it in other characters"
            ) from None
        rows.append(row + [padding] * (CLIP_TOKENS - len(row)))
    return rows


def relative_error(got: mx.array, wanted: mx.array) -> float:
    """Norm of the difference over the norm of what was wanted."""
    got, wanted = got.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.linalg.norm((got - wanted).flatten()) / mx.linalg.norm(wanted.flatten()))


def release() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    mx.clear_cache()
