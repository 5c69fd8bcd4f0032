"""Files that are sent to another node: what arrives is the file, or the receiver raises and leaves nothing."""

import queue
import threading

import pytest
import torch
from node_runs import QueueChannel
from saved_runs import flip

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.node_copy import SenderFailed, copy_file, receive_file, send_file
from megasora.checkpoint.sharded import RankFile
from megasora.fragment import Fragment
from megasora.placement import Placement

COUNTS = [0, 1, (1 << 20) - 1, 1 << 20, 2_500_000]  # fp32: up to three pieces of 4 MiB


def write(folder, count):
    folder.mkdir()
    values = torch.arange(count, dtype=torch.float32)
    file = RankFile(0, [Fragment("w", torch.Size([count]), Placement(), 0, 1, 0, {"weights": values})] if count else [])
    return folder / file.name, file.write(folder, file.values)


def send_and_receive(channel, source, written, target, on_received=lambda size: None):
    """What the sender and the receiver returned or raised."""
    results = {}

    def run(name, action):
        try:
            results[name] = action()
        except Exception as error:
            results[name] = error

    actions = {
        "sent": lambda: send_file(channel, source, written, lambda size: None),
        "received": lambda: receive_file(channel, target, on_received),
    }
    threads = [threading.Thread(target=run, args=item) for item in actions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results["sent"], results["received"]


@pytest.mark.parametrize("count", COUNTS)
def test_a_file_arrives_as_it_was_and_can_be_copied(count, tmp_path):
    source, written = write(tmp_path / "a", count)
    target = tmp_path / "b" / "file"
    target.parent.mkdir()
    assert send_and_receive(QueueChannel(queue.Queue(1)), source, written, target) == (None, written)
    assert target.read_bytes() == source.read_bytes()
    copy_file(target, written, tmp_path / "copy", lambda size: None)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("offset", [3, 200, 5 << 20, -1])
def test_damage_of_the_sender_is_its_error_and_the_next_file_arrives(offset, tmp_path):
    channel, (source, written) = QueueChannel(queue.Queue(1)), write(tmp_path / "a", COUNTS[-1])
    flip(source, offset)
    target = tmp_path / "b" / "file"
    sent, received = send_and_receive(channel, source, written, target)
    assert isinstance(sent, DamagedCheckpoint) and isinstance(received, SenderFailed)
    assert list(target.parent.iterdir()) == []
    with pytest.raises(DamagedCheckpoint, match="rank-00000.safetensors"):
        copy_file(source, written, target, lambda size: None)
    assert list(target.parent.iterdir()) == []
    flip(source, offset)
    assert send_and_receive(channel, source, written, target) == (None, written)


@pytest.mark.parametrize("piece", [1, 2, 3])
def test_an_error_of_the_receiver_does_not_stop_the_sender_and_the_next_file_arrives(piece, tmp_path):
    channel, (source, written) = QueueChannel(queue.Queue(1)), write(tmp_path / "a", COUNTS[-1])
    target, pieces = tmp_path / "b" / "file", iter(range(piece - 1))

    def fail(size):
        if next(pieces, None) is None:
            raise OSError(28, "full")

    sent, received = send_and_receive(channel, source, written, target, fail)
    assert sent is None and str(received).startswith("[Errno 28] full")
    assert list(target.parent.iterdir()) == []
    assert send_and_receive(channel, source, written, target) == (None, written)


def test_a_byte_that_changes_on_its_way_is_found(tmp_path):
    class Noisy(QueueChannel):
        def receive(self, count, dtype):
            data = super().receive(count, dtype)
            if count > 1 << 20:
                data[12345] ^= 4
            return data

    source, written = write(tmp_path / "a", COUNTS[-1])
    _, received = send_and_receive(Noisy(queue.Queue(1)), source, written, tmp_path / "b" / "file")
    assert isinstance(received, DamagedCheckpoint) and "on its way from the other node" in str(received)
    assert list((tmp_path / "b").iterdir()) == []
