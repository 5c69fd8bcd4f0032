"""Codecs: map frames to latents and back.

A codec has `encode`, `decode`, `encode_frames`, `decode_latents`, `fingerprint`, `factors`, `channels`, `latent_frames`
and `num_frames`; docs/architecture.md describes them. A new one is added to `build_codec`.

    dct.py, dct_encoder.py   a fixed transform, without weights
    vae/                     the autoencoder of megasora.train_codec
    pretrained.py            autoencoders of diffusers

`resolve_codec` reads factors and channels of a codec with weights; settings, shards and models then agree with it.
`build_frame_encoder` makes the encoder of `dct` without torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from megasora.config import CodecConfig
from megasora.errors import MegaSoraError

if TYPE_CHECKING:
    from megasora.codec.dct import DCTCodec
    from megasora.codec.dct_encoder import DCTEncoder
    from megasora.codec.pretrained import PretrainedCodec
    from megasora.codec.vae.codec import VAECodec

    Codec = DCTCodec | VAECodec | PretrainedCodec


def resolve_codec(config: CodecConfig) -> CodecConfig:
    """`config` with the factors and channels of the codec at `config.path`, if it has weights; reads no weights.

    A vae without a path, which is to be trained, stays as it is. Raises MegaSoraError if the codec cannot be read, or
    if factors or channels were set to other values than its own.
    """
    if config.name == "dct":
        if config.path:
            raise MegaSoraError(
                f"codec.path={config.path} is set, but codec.name=dct has no weights; set codec.name=vae, or the name "
                "of a pretrained codec"
            )
        return config
    if config.name == "vae":
        if not config.path:
            return config
        from megasora.codec.vae.folder import find_codec_folder, read_manifest

        manifest = read_manifest(find_codec_folder(Path(config.path)))
        factors, channels = manifest.factors, manifest.channels
    else:
        from megasora.codec.pretrained_folder import pretrained_shape

        factors, channels = pretrained_shape(config)
    own, defaults = {"factors": list(factors), "channels": channels}, CodecConfig()
    for key, value in own.items():
        given = getattr(config, key)
        if given not in (value, getattr(defaults, key)):
            raise MegaSoraError(
                f"codec.{key}={given}, but the codec of codec.path={config.path} has {value}; leave codec.{key} out"
            )
    return dataclasses.replace(config, **own)


def build_codec(config: CodecConfig) -> Codec:
    """The codec of these settings, with its weights. Raises MegaSoraError."""
    config = resolve_codec(config)
    if config.name == "dct":
        from megasora.codec.dct import DCTCodec

        return DCTCodec(config)
    if config.name == "vae":
        from megasora.codec.vae.codec import VAECodec

        check_path(config)
        return VAECodec.from_folder(config)
    from megasora.codec.pretrained import PretrainedCodec

    return PretrainedCodec(config)


def codec_fingerprint(config: CodecConfig) -> str:
    """`build_codec(config).fingerprint`; of a vae it is known without its weights."""
    if config.name != "vae":
        return build_codec(config).fingerprint
    from megasora.codec.vae.folder import find_codec_folder, read_manifest, vae_fingerprint

    check_path(config)
    return vae_fingerprint(read_manifest(find_codec_folder(Path(config.path))), config)


def check_path(config: CodecConfig) -> None:
    """Raises MegaSoraError for a vae without weights."""
    if not config.path:
        raise MegaSoraError(
            "codec.name=vae needs codec.path, the run folder of megasora.train_codec, or its folder codec/"
        )


def build_frame_encoder(config: CodecConfig) -> DCTEncoder:
    from megasora.codec.dct_encoder import DCTEncoder

    return DCTEncoder(config)
