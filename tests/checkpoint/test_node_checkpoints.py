"""Checkpoints on the disks of nodes, with ranks that are threads and nodes that are folders."""

import errno
import random
import shutil

import pytest
from node_runs import Disks, has_values, launch, save, set_values

from megasora.checkpoint import fragment_file, node_copy
from megasora.checkpoint.nodes import Nodes
from megasora.checkpoint.verify import verify_checkpoint
from megasora.config import load
from megasora.errors import MegaSoraError

LAYOUTS = [(1, 1), (2, 2), (1, 3), (3, 1), (1, 1, 1), (2, 1, 3)]


@pytest.fixture
def disks(tmp_path):
    return Disks(tmp_path / "a")


def flip(file, offset=-10):
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


# ---------------------------------------------------------------- what is saved and found again


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_each_node_can_be_lost_and_what_is_put_together_has_the_bytes_of_a_save_to_the_run_folder(
    sizes, asynchronous, tmp_path
):
    expected = Disks(tmp_path / "expected")
    launch(expected, sizes, 20, every=20)
    before = Disks(tmp_path / "before")
    assert launch(before, sizes, 10, 20, asynchronous=asynchronous) == 0
    assert before.shared() == []
    for lost in [(), *((k,) for k in range(len(sizes)))]:
        disks = Disks(shutil.copytree(before.folder, tmp_path / f"without{lost}"))
        disks.lose(*lost)
        assert launch(disks, sizes) == 20
        assert disks.contents(20) == expected.contents(20)
        verify_checkpoint(disks.run_dir / "checkpoints" / "step-00000020")
        assert not list(disks.folder.rglob("*.part")) and not list(disks.folder.rglob("rank-*-0*"))


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (1, 1, 1), (2, 2, 2)], ids=str)
def test_the_run_goes_on_on_other_numbers_of_nodes_and_ranks(sizes, disks):
    launch(disks, (2, 2), 10)
    disks.lose(1)
    assert launch(disks, sizes, 20) == 10
    assert disks.shared() == ["step-00000010"]
    assert launch(disks, (1, 1), 30) == 20
    assert launch(disks, (2,)) == 30


def test_without_two_neighbours_the_run_folder_is_used(disks, capsys):
    sizes = (1, 1, 1, 1)
    launch(disks, sizes, 100, 110)
    disks.lose(1, 2)
    assert launch(disks, sizes) == 100
    assert "step 110 is not whole on the disks of the nodes: none has a part 1" in capsys.readouterr().out
    assert launch(disks, sizes, 120) == 100
    disks.lose(1, 3)  # no neighbours
    assert launch(disks, sizes) == 120


def test_without_copies_a_lost_node_is_lost(disks):
    launch(disks, (2, 1), 100, 110, node={"copy": False})
    assert len(disks.files(0, "rank-*")) == 2 and len(disks.files(1, "rank-*")) == 1
    disks.lose(1)
    assert launch(disks, (2, 1)) == 100


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "manifest.json", "state.json", "node.json"])
def test_a_damaged_file_is_taken_from_the_copy_then_the_older_step_then_the_run_folder(name, tmp_path, capsys):
    before = Disks(tmp_path / "before")
    launch(before, (1, 1, 1), 100, 110, 120, node={"keep": 2})

    def damaged(*places):
        disks = Disks(shutil.copytree(before.folder, tmp_path / str(len(list(tmp_path.iterdir())))))
        for node, step in places:
            (file,) = disks.files(node, f"step-{step:08d}-1/**/{name}") or disks.files(
                node, f"step-{step:08d}-1/{name}"
            )
            flip(file)
        return disks

    for disks in (damaged((1, 120)), damaged((2, 120))):
        assert launch(disks, (1, 1, 1)) == 120
        assert disks.shared() == ["step-00000100", "step-00000120"]
    assert launch(damaged((1, 120), (2, 120)), (1, 1, 1)) == 110
    assert name in capsys.readouterr().out
    assert launch(damaged((1, 120), (2, 120), (1, 110), (2, 110)), (1, 1, 1)) == 100
    assert launch(damaged((1, 120), (2, 110)), (1, 1, 1)) == 120


def test_two_files_of_a_node_damaged_in_different_copies_are_both_found(disks):
    launch(disks, (2, 1), 10)
    flip(disks.files(0, "rank-00000*")[0])
    flip(disks.files(1, "rank-00001*")[0])
    assert launch(disks, (2, 1)) == 10


def test_a_folder_of_something_else_is_left_out(disks, capsys):
    launch(disks, (1, 1), 100, 110)
    for node in range(2):
        (own,) = disks.node(node).glob("megasora-*/*")
        (own / "step-00000120-0").mkdir()
        (own / "step-00000130-1").symlink_to("/")
        shutil.copytree(own / "step-00000110-0", own / "step-00000110-5")
    assert launch(disks, (1, 1)) == 110
    assert "step-00000110-5 is no part of a checkpoint of this run" in capsys.readouterr().out


# ---------------------------------------------------------------- which steps are kept


def test_the_newest_are_kept_and_those_older_than_a_save_to_the_run_folder_are_deleted(disks):
    def steps():
        return {path.name for k in range(2) for path in disks.node(k).glob("megasora-*/*/*")}

    launch(disks, (1, 1), 10, 20, 30, node={"keep": 2})
    assert steps() == {f"step-000000{step}-{k}" for step in (20, 30) for k in (0, 1)}
    launch(disks, (1, 1), 90, 100)
    assert disks.shared() == ["step-00000030", "step-00000100"] and steps() == set()
    launch(disks, (1, 1), 110, action=lambda checkpoints: save_and_finish(checkpoints, 115))
    assert disks.shared() == ["step-00000100", "step-00000115"]
    assert not list(disks.node(0).iterdir()), "an empty folder is left"


def test_what_is_older_than_a_checkpoint_in_the_run_folder_is_not_put_there(disks):
    def save_both(checkpoints):
        checkpoints.saver.on_saved = lambda save: None  # the launch is killed before it deletes anything
        save(checkpoints, 90, 100)

    launch(disks, (1, 1), action=save_both)
    assert disks.files(0, "step-00000090-0/*") and launch(disks, (1, 1)) == 100
    assert disks.shared() == ["step-00000100"] and not disks.files(0)


def save_and_finish(checkpoints, step):
    set_values(checkpoints, step)
    checkpoints.save_if_due(step, True, lambda: {"tag": f"of {step}"})
    checkpoints.finish()


def test_while_a_save_is_under_way_the_next_waits_or_is_left_out_but_none_of_the_run_folder_for_one_of_the_nodes(disks):
    def decide(checkpoints):
        shared, node = checkpoints.saver.shared, checkpoints.node
        due = {}
        for busy in (None, shared, node):
            checkpoints.saver.current = busy and type("Save", (), {"target": busy})()
            due[busy] = [checkpoints.due(*args) for args in [(5, False), (10, False), (100, False), (5, True)]]
        checkpoints.saver.current = None
        assert due[None] == [None, node, shared, shared]
        if checkpoints.settings.when_busy == "wait":
            assert due[shared] == due[node] == due[None]
        else:
            assert due[shared] == [None, None, None, shared] and due[node] == [None, None, shared, shared]

    for when_busy in ("wait", "skip"):
        launch(disks, (1, 1), action=decide, when_busy=when_busy)


# ---------------------------------------------------------------- which launches resume from nodes


@pytest.mark.parametrize("start, step", [("resume", 120), ("resume:step-00000100", 100), ("resume-or-fresh", 120)])
def test_a_start_from_an_older_step_ignores_what_is_newer_for_ever(start, step, disks):
    launch(disks, (1, 1), 100, 110, 120)
    assert launch(disks, (1, 1), start=start) == step
    assert launch(disks, (1, 1), start=start) == step, "a requeued launch"
    assert launch(disks, (1, 1), 110, start=start) == step
    assert launch(disks, (1, 1), start=start) == (120 if step == 120 else 110)


@pytest.mark.parametrize("start", ["fresh", "init:/somewhere"])
def test_a_new_run_in_the_folder_ignores_the_nodes_of_the_old_one(start, disks):
    launch(disks, (1, 1), 10)
    assert launch(disks, (1, 1), start=start) == 0
    assert not disks.shared() and not disks.files(0)


def test_a_run_folder_that_was_made_again_has_other_nodes_folders(disks):
    launch(disks, (1, 1), 10)
    shutil.rmtree(disks.run_dir)
    disks.run_dir.mkdir()
    assert launch(disks, (1, 1)) == 0


def test_what_a_node_has_of_an_earlier_launch_is_never_used_again(disks, tmp_path):
    launch(disks, (1, 1), 100, 110)
    shutil.copytree(disks.node(0), tmp_path / "away0")
    shutil.copytree(disks.node(1), tmp_path / "away1")
    disks.lose(0, 1)
    assert launch(disks, (1, 1)) == 100  # trains another step 110
    disks.lose(0, 1)
    shutil.copytree(tmp_path / "away0", disks.node(0))
    shutil.copytree(tmp_path / "away1", disks.node(1))
    assert launch(disks, (1, 1)) == 100
    assert not disks.files(0)


def test_a_launch_without_node_dir_makes_the_nodes_worthless_and_says_so(disks, capsys):
    launch(disks, (1, 1), 100, 110)
    assert launch(disks, (1, 1), node={"dir": ""}) == 100
    assert "checkpoint.node.dir is not set" in capsys.readouterr().out
    assert launch(disks, (1, 1)) == 100


def test_parts_of_two_saves_of_a_step_are_not_mixed(disks, tmp_path):
    def exchange(checkpoints):
        def on_main(action):
            checkpoints.ranks.barrier()
            if checkpoints.ranks.rank == 0:
                action()
            checkpoints.ranks.barrier()

        on_main(lambda: shutil.copytree(disks.node(1), tmp_path / "first"))
        save(checkpoints, 110)
        on_main(lambda: disks.lose(1))
        on_main(lambda: shutil.copytree(tmp_path / "first", disks.node(1)))

    launch(disks, (1, 1), 100, 110, action=exchange, node={"copy": False})
    assert launch(disks, (1, 1)) == 100


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("end", ["writes", "receives", "sends"])
def test_an_error_of_one_rank_is_raised_on_all_and_nothing_is_left_and_the_next_save_works(end, disks, monkeypatch):
    fails = {"now": True}
    full = OSError(errno.ENOSPC, "No space left on device", "the file")
    write, receive, read = fragment_file.write_fragment_file, node_copy.atomic_writer, node_copy.read_pieces

    def failing(real, is_victim):
        def call(path, *arguments):
            if fails["now"] and is_victim(path):
                raise full
            return real(path, *arguments)

        return call

    victim = {
        "writes": lambda path: "node1" in str(path) and path.name == "rank-00002.safetensors",
        "receives": lambda path: "node0" in str(path) and path.name == "rank-00002.safetensors",
        "sends": lambda path: "node1" in str(path) and path.name == "rank-00002.safetensors",
    }[end]
    if end == "writes":
        monkeypatch.setattr("megasora.checkpoint.sharded.write_fragment_file", failing(write, victim))
    elif end == "receives":
        monkeypatch.setattr(node_copy, "atomic_writer", failing(receive, victim))
    else:
        monkeypatch.setattr(node_copy, "read_pieces", failing(read, victim))

    def train(checkpoints):
        with pytest.raises(OSError, match="No space left on device") as error:
            save(checkpoints, 20)
        assert error.value.errno == errno.ENOSPC
        checkpoints.ranks.barrier()
        if checkpoints.ranks.rank == 0:
            fails["now"] = False
            assert not list(disks.folder.rglob("*.part"))
        checkpoints.ranks.barrier()
        save(checkpoints, 30)
        assert not has_values(checkpoints, 30)

    fails["now"] = False
    launch(disks, (2, 2), 10, action=lambda c: fail_and_train(c, fails, train))
    assert launch(disks, (2, 2)) == 30


def fail_and_train(checkpoints, fails, train):
    checkpoints.ranks.barrier()
    fails["now"] = True
    checkpoints.ranks.barrier()
    train(checkpoints)


def test_a_disk_without_room_is_found_before_anything_is_written(disks, monkeypatch):
    def fill(checkpoints):
        checkpoints.node.bytes = [1.0, float(1 << 60)]
        with pytest.raises(OSError, match=r"checkpoint.node.dir: the checkpoint of step 20 needs 1,152,921,504.61 GB"):
            save(checkpoints, 20)
        checkpoints.ranks.barrier()

    launch(disks, (2, 1), 10, action=fill)
    assert not list(disks.folder.rglob("*.part"))
    assert launch(disks, (2, 1)) == 10


def test_a_run_folder_without_room_for_what_the_nodes_have_is_an_error_and_nothing_changes(disks, monkeypatch):
    launch(disks, (2, 1), 10)
    with monkeypatch.context() as patched:
        patched.setattr(
            "megasora.checkpoint.node_resume.copy_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(OSError, match="full"):
            launch(disks, (2, 1))
    assert not list(disks.folder.rglob("*.part")) and not disks.shared()
    assert launch(disks, (2, 1)) == 10


def test_a_folder_that_two_nodes_share_or_that_cannot_be_made_is_an_error(disks):
    with pytest.raises(MegaSoraError, match=r"checkpoint.node.dir=\S+ is the same folder on several machines") as error:
        launch(disks, (1, 1), node={"dir": str(disks.folder / "same")})
    assert "\n" not in str(error.value) and not list((disks.folder / "same").iterdir())
    with pytest.raises(MegaSoraError, match="checkpoint.node.dir=.*: the environment has no variable NO_SUCH_VARIABLE"):
        launch(disks, (1, 1), node={"dir": lambda node: f"{disks.folder}/{'$NO_SUCH_VARIABLE' if node else 'one'}"})
    (disks.folder / "file").touch()
    with pytest.raises(MegaSoraError, match="checkpoint.node.dir=.*file: .*file is not a folder; choose another one"):
        launch(disks, (1, 1), node={"dir": lambda node: str(disks.folder / ("file" if node else "one"))})


def test_an_old_part_that_cannot_be_deleted_is_an_error_of_all_at_the_next_save(disks, monkeypatch):
    def train(checkpoints):
        if checkpoints.ranks.rank == 1:
            checkpoints.node.store.keep_newest = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken", "disk"))
        save(checkpoints, 20)
        with pytest.raises(OSError, match="broken: 'disk'"):
            save(checkpoints, 30)

    launch(disks, (1, 1), 10, action=train)
    assert launch(disks, (1, 1)) == 20


def test_saves_to_the_nodes_must_be_more_frequent_than_those_to_the_run_folder():
    with pytest.raises(MegaSoraError, match="checkpoint.node.every=50 must be less than checkpoint.every=50"):
        load(None, ["checkpoint.node.dir=/x", "checkpoint.node.every=50", "checkpoint.every=50"])
    load(None, ["checkpoint.node.every=50", "checkpoint.every=50"])


@pytest.mark.parametrize("text", ["", "{}", '{"run": "../../etc", "launch": "x"}', "[1]"])
def test_damaged_names_of_the_nodes_folders_are_an_error_of_one_line(text, disks):
    launch(disks, (1, 1), 10)
    (disks.run_dir / "node_checkpoints.json").write_text(text)
    with pytest.raises(MegaSoraError, match="node_checkpoints.json cannot be read: .*; remove it") as error:
        launch(disks, (1, 1))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- pairs


def test_the_ends_of_all_channels_meet_without_waiting_in_a_circle():
    draw = random.Random(0)
    for count in [2, 3, 4, 5, 8, 9] * 3:
        sizes = [draw.randint(1, 3) for _ in range(count)]
        nodes = Nodes(tuple(sum(sizes[:k]) for k in range(count)), sum(sizes))
        waiting = {rank: nodes.pairs_of(rank) for rank in range(sum(sizes))}
        assert sorted(pair for k in range(count) for pair in nodes.copies_from(k)) == sorted(
            {pair for pairs in waiting.values() for pair in pairs}
        )
        rounds = 0
        while any(waiting.values()):
            heads = {rank: pairs[0] for rank, pairs in waiting.items() if pairs}
            meet = {pair for pair in heads.values() if heads.get(pair[0]) == heads.get(pair[1]) == pair}
            assert meet, waiting
            for rank, pair in heads.items():
                waiting[rank] = waiting[rank][1:] if pair in meet else waiting[rank]
            rounds += 1
        assert rounds <= 3 * 3, "the time grows with the number of nodes"
