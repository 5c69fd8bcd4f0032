"""What the first node makes of what all nodes found; tests/slurm/ holds the same against real nodes."""

from __future__ import annotations

import pytest

from megasora.config import load
from megasora.preflight import Node, compare, judge, look, name_slow, sources

VERSIONS = {"torch": "2.13.0", "megasora": "abcdef12"}


def nodes(count: int = 3) -> list[Node]:
    return [Node(f"node{number}", dict(VERSIONS), clock=0.01 * number) for number in range(count)]


def problems(found: list[Node]) -> dict[str, list[str]]:
    return {node.name: node.problems for node in found if node.problems}


def test_equal_nodes_are_fit():
    found = nodes()
    compare(found)
    assert judge(found, 3, False) == (["node0", "node1", "node2"], "")
    assert judge(found, 2, False) == (["node0", "node1"], "")  # spares that are not needed


@pytest.mark.parametrize(
    ("key", "value", "words"), [("torch", "2.12.0", "torch is 2.12.0, elsewhere 2.13.0"), ("megasora", "0", "code of")]
)
def test_the_node_that_differs_from_most_is_named_even_if_it_is_the_first(key, value, words):
    for place in range(3):
        found = nodes()
        found[place].versions[key] = value
        compare(found)
        assert list(problems(found)) == [f"node{place}"] and words in found[place].problems[0]


@pytest.mark.parametrize(("seconds", "words"), [(-7.0, "7.0 s behind"), (7.0, "7.0 s ahead of")])
def test_the_clock_that_is_off_is_named_even_if_it_is_the_one_they_are_measured_by(seconds, words):
    one_off, first_off = nodes(), nodes()
    one_off[1].clock += seconds
    for node in first_off[1:]:
        node.clock -= seconds
    for found, name in ((one_off, "node1"), (first_off, "node0")):
        compare(found)
        assert problems(found) == {name: [f"its clock is {words} the others"]}


def test_a_clock_within_two_seconds_is_right():
    found = nodes()
    found[1].clock = 1.9
    compare(found)
    assert not problems(found)


def test_a_node_at_less_than_half_the_usual_speed_is_named_and_one_without_a_figure_is_not():
    found = nodes(4)
    for node, rate in zip(found, (10.0, 4.0, 11.0, 0.0), strict=True):
        node.gib_per_second = rate
    name_slow(found, "gib_per_second", "{:.0f} of {:.0f}")
    assert problems(found) == {"node1": ["4 of 10"]}


def test_bad_nodes_are_left_out_on_request_if_enough_remain():
    found = nodes()
    found[1].problems.append("GPU 3 fails")
    chosen, reason = judge(found, 2, False)
    assert chosen == [] and "node1: GPU 3 fails" in reason and "--spare" in reason
    assert judge(found, 2, True) == (["node0", "node2"], "")
    chosen, reason = judge(found, 3, True)
    assert chosen == [] and "2 of 3 nodes are fit, 3 are needed; node1: GPU 3 fails" in reason


def test_a_node_that_has_not_answered_is_no_part_of_a_majority():
    found = [*nodes(1), Node("gone", problems=["did not answer"])]
    compare(found)
    assert problems(found) == {"gone": ["did not answer"]}


def test_a_node_says_what_it_lacks(tmp_path, monkeypatch):
    config = load(None, [f"run.dir={tmp_path / 'a' / 'run'}", f"data.shards={tmp_path / 'shards'}", "run.device=cpu"])
    monkeypatch.setattr("megasora.preflight.version_of", lambda name: None if name == "av" else "1")
    monkeypatch.setattr("megasora.preflight.LEAST_DISK_MIB", 1 << 40)
    node = look("here", config, 1)
    text = "; ".join(node.problems)
    assert "av is missing" in text and f"no shard in {tmp_path / 'shards'}" in text
    assert f"{tmp_path} has" in text and "MiB free" in text  # the folder above the run's that is there
    assert node.versions["av"] == "missing" and node.versions["megasora"] == sources()
    assert not (tmp_path / "a").exists()
