"""`t5` and `clip`: a frozen text encoder, run once at ingest through transformers.

    captions --tokenizer--> ids --encoder--> features [S_i, E]        at ingest; stored in the shards
    features [S, E] --embedder (trained)--> tokens [S, D]             at every step

Training needs only the config file and the fingerprint of the weights; the first `encode` loads the weights themselves.
Features are fp32 on the CPU, whatever device and dtype the encoder runs in.
"""

from __future__ import annotations

import hashlib
import json
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.config import TextConfig
from megasora.errors import MegaSoraError, printable
from megasora.files import read_regular_file
from megasora.jsonl import parse_json
from megasora.text.embedders import FeatureEmbedder

if TYPE_CHECKING:
    from types import ModuleType

# text.name -> model_type in config.json -> class of transformers
ENCODERS = {
    "t5": {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"},
    "clip": {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"},
}
ENCODER_BATCH = 32  # captions in one call of the encoder
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # in the order that transformers prefers
SMALL_FILES = ["*.json", "*.model", "*.txt"]  # config and tokenizer
MAX_CONFIG_BYTES = 16 << 20
NUM_PAGES, PAGE_BYTES = 64, 4096  # of each weights file, hashed for the fingerprint


class PretrainedEncoder:
    """caption -> fp32 [S_i, E]. Raises MegaSoraError where `text.path` cannot be read or transformers is missing."""

    precomputed = True

    def __init__(self, config: TextConfig, device: torch.device | str | None = None):
        """`device`: where the encoder runs; None: the GPU if there is one."""
        self.name, self.path, self.max_tokens, self.pad = config.name, config.path, config.max_tokens, config.pad
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.transformers = import_transformers(config.name)
        self.folder, self.tokenizer_folder = pipeline_folders(find_folder(config.path))
        self.model_type, self.weights_config = read_config(self.folder, config)
        self.model_class = getattr(self.transformers, ENCODERS[config.name][self.model_type])
        self.weights = find_weights(self.folder, config.path)
        architecture = self.load(self.model_class.config_class.from_pretrained)
        self.text_dim = architecture.hidden_size  # E
        positions = getattr(architecture, "max_position_embeddings", None)
        if positions and config.max_tokens > positions:
            raise MegaSoraError(
                f"text.max_tokens={config.max_tokens} is more than the {positions} positions of "
                f"text.path={config.path}; use at most {positions}"
            )
        self.lock = threading.Lock()  # `encode` may be called by several threads

    @cached_property
    def fingerprint(self) -> str:
        """Encoders with the same fingerprint give the same features. It hashes the config, and of each weights file the
        name, the size and 64 evenly spaced pages, so only a few MB are read."""
        digest = hashlib.sha256(json.dumps(self.weights_config, sort_keys=True).encode())
        for path in self.weights:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for page in range(NUM_PAGES):
                    file.seek(max(0, size - PAGE_BYTES) * page // (NUM_PAGES - 1))
                    digest.update(file.read(PAGE_BYTES))
        padding = f"-pad{self.max_tokens}" if self.pad else ""
        return f"{self.name}-{self.model_type}-{digest.hexdigest()[:16]}{padding}"

    @cached_property
    def tokenizer(self) -> Any:
        return self.load(self.transformers.AutoTokenizer.from_pretrained, folder=self.tokenizer_folder)

    @cached_property
    def encoder(self) -> nn.Module:
        model, info = self.load(self.model_class.from_pretrained, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise MegaSoraError(
                f"text.path={self.path} lacks {len(missing)} weights of a {self.model_class.__name__}, "
                f"e.g. {missing[0]}; give the folder of a whole {self.name} encoder"
            )
        return model.eval().requires_grad_(False).to(self.device)

    def load(self, from_pretrained: Any, folder: Path | None = None, **options: Any) -> Any:
        try:
            return from_pretrained(folder or self.folder, local_files_only=True, **options)
        except Exception as error:  # each library raises its own exceptions on damaged files
            raise load_error(self.path, error) from None

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """fp32 [S_i, E] per caption, S_i >= 1; with `text.pad`, padded with zeros to `text.max_tokens`.

        Raises MegaSoraError where a caption has more than `text.max_tokens` tokens; captions are not truncated.
        """
        with self.lock:
            ids = [self.tokenize(caption) for caption in captions]
            by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # keeps padding small
            features: list[Tensor] = [torch.empty(0)] * len(ids)
            for start in range(0, len(ids), ENCODER_BATCH):
                batch = by_length[start : start + ENCODER_BATCH]
                for i, text_SE in zip(batch, self.encode_batch([ids[i] for i in batch]), strict=True):
                    features[i] = text_SE
        if self.pad:
            features = [F.pad(text_SE, (0, 0, 0, self.max_tokens - len(text_SE))) for text_SE in features]
        return features

    def tokenize(self, caption: str) -> list[int]:
        ids = self.tokenizer(caption, truncation=False, verbose=False)["input_ids"] or [self.filler_id]
        if len(ids) > self.max_tokens:
            raise MegaSoraError(
                f"caption of {len(ids)} tokens ('{caption[:40]}...') is longer than text.max_tokens={self.max_tokens}; "
                "shorten the caption or raise text.max_tokens"
            )
        return ids

    @property
    def filler_id(self) -> int:
        """The token id that pads a batch, and the one token of a caption for which the tokenizer gives none."""
        candidates = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0)
        return next(token for token in candidates if token is not None)

    def encode_batch(self, ids: list[list[int]]) -> list[Tensor]:
        longest = max(map(len, ids))
        ids_BS = torch.full((len(ids), longest), self.filler_id)
        mask_BS = torch.zeros_like(ids_BS)
        for row, tokens in enumerate(ids):
            ids_BS[row, : len(tokens)] = torch.tensor(tokens)
            mask_BS[row, : len(tokens)] = 1
        out = self.encoder(input_ids=ids_BS.to(self.device), attention_mask=mask_BS.to(self.device))
        hidden_BSE = out.last_hidden_state.float().cpu()
        return [hidden_BSE[row, : len(tokens)].clone() for row, tokens in enumerate(ids)]

    def build_embedder(
        self, width: int, depth: int, heads: int, backend: str = "auto", deterministic: bool = True
    ) -> nn.Module:
        """`backend`, `deterministic`: of attention."""
        return FeatureEmbedder(self.text_dim, width, depth, heads, backend, deterministic)


def import_transformers(name: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MegaSoraError(f"text.name={name} needs transformers ({error}): pip install megasora[encoders]") from None
    return transformers


def find_folder(path: str) -> Path:
    """`path` itself, or the local copy of the hub repository of this name, which is downloaded if needed."""
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=[*SMALL_FILES, WEIGHTS[0]]))
        if not any(folder.glob(WEIGHTS[0])):
            huggingface_hub.snapshot_download(path, allow_patterns=[WEIGHTS[1]])
    except Exception as error:  # no such folder or repository, no network, no permission
        raise load_error(path, error) from None
    return folder


def pipeline_folders(folder: Path) -> tuple[Path, Path]:
    """The folders of the encoder and of its tokenizer: `folder` for both, or two folders of a pipeline of diffusers."""
    encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    return (encoder, tokenizer) if encoder.is_dir() and tokenizer.is_dir() else (folder, folder)


def read_config(folder: Path, config: TextConfig) -> tuple[str, dict[str, Any]]:
    """(model type, the text encoder's values in config.json); defaults of the transformers version are not included."""
    try:
        values = parse_json(read_regular_file(folder / "config.json", MAX_CONFIG_BYTES))
        if not isinstance(values, dict) or not isinstance(values.get("text_config", {}), dict):
            raise ValueError("config.json is not an object")
    except (OSError, ValueError) as error:
        raise load_error(config.path, error) from None
    model_type, known = values.get("model_type"), ENCODERS[config.name]
    if not isinstance(model_type, str) or model_type not in known:
        raise MegaSoraError(
            f"text.path={config.path} holds a model of type '{printable(str(model_type), 60)}'; "
            f"text.name={config.name} reads {', '.join(known)}"
        )
    values = values.get("text_config", values)  # a CLIP folder may also hold the vision encoder
    volatile = ("_name_or_path", "transformers_version", "architectures")
    return model_type, {key: value for key, value in values.items() if key not in volatile}


def find_weights(folder: Path, path: str) -> list[Path]:
    for pattern in WEIGHTS:
        if files := sorted(folder.glob(pattern)):
            return files
    raise MegaSoraError(f"text.path={path} holds no weights: looked for {' and '.join(WEIGHTS)} in {folder}")


def load_error(path: str, error: Exception) -> MegaSoraError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MegaSoraError(
        f"text.path={path} cannot be loaded ({type(error).__name__}: {reason}); give a folder that save_pretrained "
        "wrote, or a hub name that this machine can reach or has downloaded"
    )
