"""Mixtures: several datasets as one list of clips, and clips that are longer than a pack."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megasora.batch import grid_coords
from megasora.config import DataConfig, load
from megasora.data.manifest_writer import write_manifest
from megasora.data.mixture import Mixture, open_mixture
from megasora.data.pack import Record, make_batch
from megasora.data.shard_format import Entry, Index, Manifest
from megasora.data.shard_reader import ShardSplit
from megasora.data.shard_writer import BlockWriter
from megasora.errors import MegaSoraError

MANIFEST = Manifest("codec-a", "text-a", [1, 1, 1], 2, {}, {}, 4)


class MemorySplit(ShardSplit):
    """A split without files: the patches of a token are its position in the clip."""

    def read(self, i, encode_caption, out_LP=None):
        entry = self.index[i]
        patches = torch.arange(entry.num_tokens).float()[:, None].expand(-1, 2)
        return Record(entry.sample_id, patches, entry.grid, encode_caption("ab"), entry.native_size, "ab")

    def read_meta(self, i):
        return {"source": f"clip-{i}.mp4"}


def make_split(grids, folder="shards", manifest=MANIFEST) -> MemorySplit:
    index = Index.from_entries([Entry(100 + i, grid, (8.0, 8.0, 1.0, 0.0), {}) for i, grid in enumerate(grids)])
    return MemorySplit(Path(folder), "train", manifest, index, [0] * len(index), ["train-000000-000.tar"])


def encode(caption):
    return torch.zeros(1, 4)


def make_mixture(*datasets, tokens_per_pack=64, split_long=False) -> Mixture:
    return Mixture(datasets, [1.0] * len(datasets), tokens_per_pack, split_long)


def test_clips_are_counted_through_the_datasets_and_sample_ids_include_the_dataset():
    mixture = make_mixture(make_split([(1, 2, 3), (2, 2, 2)]), make_split([(1, 1, 5)]))
    assert len(mixture) == 3 and [t.tolist() for t in mixture.token_counts] == [[6, 8], [5]]
    records = [mixture.read(i, encode) for i in range(3)]
    assert [r.sample_id for r in records] == [100, 101, (1 << 40) + 100]
    assert [len(r.patches_LP) for r in records] == [6, 8, 5]
    assert "shards/train-000000-000.tar, sample 100" in mixture.describe_clip(2)


# ---- clips longer than a pack


def test_a_clip_longer_than_a_pack_is_an_error_with_its_name_and_the_numbers():
    with pytest.raises(MegaSoraError) as error_info:
        make_mixture(make_split([(1, 1, 3), (1, 5, 13), (1, 1, 64), (1, 5, 14)]))
    for word in ("data.tokens_per_pack=64", "70 tokens", "sample 103", "clip-3.mp4", "1 more", "data.split_long=true"):
        assert word in str(error_info.value)
    assert len(make_mixture(make_split([(1, 1, 3), (1, 1, 64)]))) == 2  # a clip of exactly one pack is allowed


@pytest.mark.parametrize("frames", [5, 6, 7, 8, 9, 31])
def test_parts_of_a_clip_are_whole_frames_nearly_equal_and_make_up_the_clip(frames):
    split = make_split([(2, 2, 2), (frames, 3, 5), (1, 1, 1)])
    mixture = make_mixture(split, tokens_per_pack=64, split_long=True)  # 4 frames fit into a pack
    assert mixture.tokens_I[0] == 8 and mixture.tokens_I[-1] == 1
    parts = [mixture.read(i, encode) for i in range(1, len(mixture) - 1)]
    assert len(parts) == -(-frames // 4)
    counts = [len(part.patches_LP) // 15 for part in parts]
    assert all(len(part.patches_LP) % 15 == 0 for part in parts) and max(counts) - min(counts) <= 1
    assert {(part.sample_id, part.grid) for part in parts} == {(101, (frames, 3, 5))}
    assert torch.equal(torch.cat([part.patches_LP[:, 0] for part in parts]), torch.arange(frames * 15).float())
    assert [int(part.positions_L[0]) for part in parts] == [int(part.patches_LP[0, 0]) for part in parts]
    coords = torch.cat([make_batch([part], 64).coords_L3[: len(part.patches_LP)] for part in parts])
    assert torch.equal(coords, grid_coords((frames, 3, 5)))


def test_parts_are_noised_as_the_whole_clip_is():
    """Noise, timestep and rows of a part are those of its tokens in the whole clip."""
    from megasora.diffusion.flow import FlowMatching

    def add_noise(clips):
        packs = [make_batch([clips.read(i, encode)], 120) for i in range(len(clips))]
        return [FlowMatching(load(None).objective, 3).add_noise(pack, 11) for pack in packs]

    shards = make_split([(8, 3, 5)])
    ((whole, target, weight),) = add_noise(make_mixture(shards, tokens_per_pack=120))
    parts = add_noise(make_mixture(shards, tokens_per_pack=60, split_long=True))
    assert len(parts) == 2
    for pick in (lambda n, t, w: n.patches_LP, lambda n, t, w: t, lambda n, t, w: w):
        found = torch.cat([pick(*part)[: part[0].num_tokens] for part in parts])
        assert torch.equal(found, pick(whole, target, weight))


def test_a_clip_with_latent_frames_longer_than_a_pack_is_an_error_even_if_it_may_be_split():
    with pytest.raises(MegaSoraError, match=r"data.tokens_per_pack=64 .* 65 tokens of one latent frame of sample 100"):
        make_mixture(make_split([(2, 5, 13)]), split_long=True)


# ---- several datasets


@pytest.mark.parametrize(
    ("key", "value"),
    [("codec_fingerprint", "codec-b"), ("text_fingerprint", "text-b"), ("patch", [1, 2, 2]), ("patch_dim", 3)],
)
def test_datasets_made_with_different_settings_are_an_error_with_both_names(key, value):
    other = dataclasses.replace(MANIFEST, **{key: value})
    with pytest.raises(MegaSoraError) as error_info:
        make_mixture(make_split([(1, 1, 1)], "films"), make_split([(1, 1, 1)], "photos", other))
    for word in ("films", "photos", key, str(value), str(getattr(MANIFEST, key))):
        assert word in str(error_info.value)


def test_the_identity_depends_on_clips_lengths_and_weights_but_not_on_the_folder():
    def identity(grids, folder="shards", weight=1.0):
        return Mixture([make_split(grids, folder)], [weight], 64, False).identity()

    grids = [(1, 2, 3), (2, 2, 2)]
    assert identity(grids) == identity(list(grids), "elsewhere")
    for other in (
        identity(grids[:1]),
        identity(grids[::-1]),
        identity([(1, 2, 3), (2, 2, 1)]),
        identity(grids, weight=2.0),
    ):
        assert other != identity(grids)


def write(folder: Path, ids: list[int], split="train", caption="ab", value=0.0, shard_bytes=1 << 20) -> Path:
    with BlockWriter(folder, 0, shard_bytes) as writer:
        for i in ids:
            patches_LP, size = torch.full((4, 2), i + value), (8.0, 8.0, 1.0, 0.0)
            record = Record(i, patches_LP, (1, 2, 2), torch.zeros(1, 4), size, caption)
            writer.add(split, record, {"source": f"{i}.png", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "codec-a", "text-a", [1, 1, 1], 1, {"name": "a"})
    return folder


def test_the_identity_depends_on_captions_and_patches_but_not_on_the_tars(tmp_path):
    def identity(name, **changes):
        shards = write(tmp_path / name, [0, 1, 2], **changes)
        return open_mixture(load(None, [f"data.shards={shards}"]).data, "train").identity()

    first = identity("first")
    assert identity("other tars", shard_bytes=1) == first
    assert [len(list((tmp_path / name).glob("*.tar"))) for name in ("first", "other tars")] == [1, 3]
    for key, changes in (("captions", {"caption": "cd"}), ("patches", {"value": 0.5})):
        other = identity(key, **changes)
        assert {name for name in first if first[name] != other[name]} == {key}


def test_a_mixture_is_opened_from_one_folder_or_several_with_weights(tmp_path):
    films, photos = write(tmp_path / "films", [0, 1, 2]), write(tmp_path / "photos", [0, 5])
    one = open_mixture(load(None, [f"data.shards={films}"]).data, "train")
    assert [one.read(i, encode).sample_id for i in range(len(one))] == [0, 1, 2] and one.weights == [1.0]
    both = open_mixture(load(None, [f"data.mixture=[{films},{photos}]", "data.mixture_weights=[3,0.5]"]).data, "train")
    ids = [both.read(i, encode).sample_id for i in range(len(both))]
    assert ids == [0, 1, 2, 1 << 40, (1 << 40) + 5] and both.weights == [3.0, 0.5]
    assert float(both.read(4, encode).patches_LP[0, 0]) == 5
    assert len(open_mixture(DataConfig(shards=str(films)), "val")) == 0


def test_a_dataset_without_training_clips_is_an_error_with_its_name(tmp_path):
    empty, photos = write(tmp_path / "empty", [1], "val"), write(tmp_path / "photos", [0, 5])
    for data in (
        DataConfig(shards=str(empty)),
        DataConfig(mixture=[str(photos), str(empty)], mixture_weights=[1.0, 1.0]),
    ):
        with pytest.raises(MegaSoraError, match="empty has no clip in its train split"):
            open_mixture(data, "train")


@pytest.mark.parametrize("weight", ["0", "-1", ".nan", ".inf"])
def test_a_weight_that_is_not_positive_is_an_error_with_its_place(weight):
    with pytest.raises(MegaSoraError, match=r"data.mixture_weights\[1\]=.* must be above 0"):
        load(None, ["data.mixture=[a,b/c]", f"data.mixture_weights=[1,{weight}]"])


def test_a_folder_together_with_a_mixture_is_an_error():
    with pytest.raises(MegaSoraError, match="both set"):
        load(None, ["data.shards=a", "data.mixture=[b]", "data.mixture_weights=[1]"])


@pytest.mark.parametrize(("mixture", "weights"), [("[a,b]", "[1]"), ("[]", "[1]"), ("[a]", "[]")])
def test_a_mixture_without_one_weight_per_folder_is_an_error(mixture, weights):
    with pytest.raises(MegaSoraError, match=r"data.mixture=.* data.mixture_weights=.* give one weight per folder"):
        load(None, [f"data.mixture={mixture}", f"data.mixture_weights={weights}"])
