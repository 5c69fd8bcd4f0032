"""What the first node concludes from the findings of all nodes; tests/slurm/ runs the preflight on real nodes."""

from __future__ import annotations

import pytest

from megasora.preflight.node import Node
from megasora.preflight.verdict import compare_nodes, flag_slow_nodes, select_nodes

VERSIONS = {"torch": "2.13.0", "megasora": "abcdef12"}


def make_nodes(count: int = 3) -> list[Node]:
    return [Node(f"node{rank}", dict(VERSIONS), clock=0.01 * rank) for rank in range(count)]


def problems(nodes: list[Node]) -> dict[str, list[str]]:
    return {node.name: node.problems for node in nodes if node.problems}


def test_equal_nodes_are_fit():
    nodes = make_nodes()
    compare_nodes(nodes)
    assert select_nodes(nodes, 3, False) == (["node0", "node1", "node2"], "")
    assert select_nodes(nodes, 2, False) == (["node0", "node1"], "")  # spare nodes that are not needed


@pytest.mark.parametrize(
    ("key", "value", "words"), [("torch", "2.12.0", "torch is 2.12.0, elsewhere 2.13.0"), ("megasora", "0", "code of")]
)
def test_the_node_that_differs_from_most_is_named_even_if_it_is_the_first(key, value, words):
    for rank in range(3):
        nodes = make_nodes()
        nodes[rank].versions[key] = value
        compare_nodes(nodes)
        assert list(problems(nodes)) == [f"node{rank}"] and words in nodes[rank].problems[0]


@pytest.mark.parametrize(("seconds", "words"), [(-7.0, "7.0 s behind"), (7.0, "7.0 s ahead of")])
def test_the_wrong_clock_is_named_even_if_it_is_that_of_the_first_node(seconds, words):
    one_off, first_off = make_nodes(), make_nodes()
    one_off[1].clock += seconds
    for node in first_off[1:]:
        node.clock -= seconds
    for nodes, name in ((one_off, "node1"), (first_off, "node0")):
        compare_nodes(nodes)
        assert problems(nodes) == {name: [f"its clock is {words} the others"]}


def test_a_difference_of_less_than_two_seconds_is_accepted():
    nodes = make_nodes()
    nodes[1].clock = 1.9
    compare_nodes(nodes)
    assert not problems(nodes)


def test_a_node_below_half_the_median_speed_is_named_and_one_without_a_measurement_is_not():
    nodes = make_nodes(4)
    for node, rate in zip(nodes, (10.0, 4.0, 11.0, 0.0), strict=True):
        node.gib_per_second = rate
    flag_slow_nodes(nodes, "gib_per_second", "{:.0f} of {:.0f}")
    assert problems(nodes) == {"node1": ["4 of 10"]}


def test_unfit_nodes_are_left_out_on_request_if_enough_remain():
    nodes = make_nodes()
    nodes[1].problems.append("GPU 3 fails")
    names, reason = select_nodes(nodes, 2, False)
    assert names == [] and "node1: GPU 3 fails" in reason and "--spare" in reason
    assert select_nodes(nodes, 2, True) == (["node0", "node2"], "")
    names, reason = select_nodes(nodes, 3, True)
    assert names == [] and "2 of 3 nodes are fit, 3 are needed; node1: GPU 3 fails" in reason


def test_a_node_that_has_not_answered_does_not_count_for_the_majority():
    nodes = [*make_nodes(1), Node("gone", problems=["did not answer"])]
    compare_nodes(nodes)
    assert problems(nodes) == {"gone": ["did not answer"]}
