"""Ranks by node, and the environment that torchrun would set."""

from __future__ import annotations

from l4_ray.places import Where, rank_places


def test_ranks_of_a_node_follow_one_another_from_actor_0() -> None:
    """Ray placed the four actors by turns; the second node gave its GPUs 2 and 5."""
    b, a = Where(node="b", address="10.0.0.2", devices=("0",)), Where(node="a", address="10.0.0.1", devices=("2",))
    places = rank_places(
        [
            b,
            a,
            Where(node="b", address="10.0.0.2", devices=("1",)),
            Where(node="a", address="10.0.0.1", devices=("5",)),
        ],
        29500,
    )
    assert [place.actor for place in places] == [0, 2, 1, 3]
    environments = [place.environment for place in places]
    assert [e["RANK"] for e in environments] == ["0", "1", "2", "3"]
    assert [e["LOCAL_RANK"] for e in environments] == ["0", "1", "0", "1"]
    assert [e["GROUP_RANK"] for e in environments] == ["0", "0", "1", "1"]
    assert {e["LOCAL_WORLD_SIZE"] for e in environments} == {"2"}
    assert {e["WORLD_SIZE"] for e in environments} == {"4"}
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environments} == {("10.0.0.2", "29500")}
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0,1", "0,1", "2,5", "2,5"]


def test_nodes_may_have_more_ranks_than_others_and_no_gpus() -> None:
    actors = [Where(node=n, address=f"10.0.0.{n}") for n in "1121"]
    environments = [place.environment for place in rank_places(actors, 1)]
    assert [e["LOCAL_WORLD_SIZE"] for e in environments] == ["3", "3", "3", "1"]
    assert all("CUDA_VISIBLE_DEVICES" not in e for e in environments)
