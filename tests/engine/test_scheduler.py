"""What one step takes, in small cases with known answers. The properties over all cases are in test_scheduler_properties.py."""

from __future__ import annotations

from helpers.small_engine import ask, engine, pieces, run, steps, turns
from l4core.engine.batch import ScheduledSequence

# --- what a step takes -----------------------------------------------------------------------------------------------------------------


def test_a_piece_ends_at_a_chunk_border_though_tokens_are_left() -> None:
    made = engine()
    made.scheduler.add(ask("a", 19, max_tokens=2))
    assert steps(made) == [[("a", 0, 8)], [("a", 8, 16)], [("a", 16, 19)], [("a", 19, 20)]]


def test_only_the_last_piece_draws() -> None:
    made = engine()
    made.scheduler.add(ask("a", 9))
    flags = []
    for _ in range(3):
        batch = made.scheduler.schedule()
        assert batch is not None
        flags.append((batch.sequences[0].draws, batch.sequences[0].is_decode, batch.step))
        made.scheduler.commit(made.execute(batch))
    assert flags == [(False, False, 1), (True, False, 2), (True, True, 3)]


def test_decodes_come_first_and_prefill_gets_what_they_leave() -> None:
    made = engine(max_tokens_per_step=6)
    for name in "ab":
        made.scheduler.add(ask(name, 2))
    made.step()
    made.scheduler.add(ask("c", 7))
    assert steps(made) == [
        [("a", 2, 3), ("b", 2, 3), ("c", 0, 4)],
        [("a", 3, 4), ("b", 3, 4), ("c", 4, 7)],
        [("a", 4, 5), ("b", 4, 5), ("c", 7, 8)],
        [("c", 8, 9)],
        [("c", 9, 10)],
    ]


def test_running_prompts_go_on_before_new_ones_start() -> None:
    made = engine(max_tokens_per_step=10)
    made.scheduler.add(ask("a", 14, max_tokens=1))
    made.scheduler.add(ask("b", 3, max_tokens=1))
    assert steps(made) == [[("a", 0, 8), ("b", 0, 2)], [("a", 8, 14), ("b", 2, 3)]]


def test_no_more_run_than_a_step_has_tokens_for() -> None:
    made = engine(max_tokens_per_step=2)
    made.scheduler.add(ask("a", 1, max_tokens=3))
    made.scheduler.add(ask("b", 1, max_tokens=3))
    made.scheduler.add(ask("c", 1, max_tokens=3))
    assert steps(made) == [
        [("a", 0, 1), ("b", 0, 1)],
        [("a", 1, 2), ("b", 1, 2)],
        [("a", 2, 3), ("b", 2, 3)],
        [("c", 0, 1)],
        [("c", 1, 2)],
        [("c", 2, 3)],
    ]


def test_no_more_run_than_there_are_rows_and_rows_are_used_again() -> None:
    made = engine(max_running=2)
    for name in "abc":
        made.scheduler.add(ask(name, 1, max_tokens=2))
    rows: dict[str, int] = {}
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        rows.update({s.request.request_id: s.row for s in batch.sequences})
        made.scheduler.commit(made.execute(batch))
    assert rows["a"] != rows["b"]
    assert rows["c"] in (rows["a"], rows["b"])


def test_new_pages_carry_only_what_changed() -> None:
    made = engine()
    made.scheduler.add(ask("a", 7, max_tokens=4))
    seen = []
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        seen.append({name: (new.first_index, list(new.pages)) for name, new in batch.sequences[0].new_pages.items()})
        made.scheduler.commit(made.execute(batch))
    assert seen == [
        {"global": (0, [1, 2, 3, 4]), "local": (0, [80, 81, 82, 83])},
        {},
        {
            "global": (4, [5]),
            "local": (4, [96]),
        },  # a new chunk: the global page takes the superpage that the old one gave back
        {},
    ]


# --- priorities, preemption, admission -------------------------------------------------------------------------------------------------


def test_higher_priority_starts_first_then_arrival_order() -> None:
    made = engine(max_running=1)
    for name, priority in (("a", 0), ("b", 1), ("c", 1), ("d", -1)):
        made.scheduler.add(ask(name, 1, max_tokens=1, priority=priority))
    assert [step[0][0] for step in steps(made)] == ["b", "c", "a", "d"]


def test_a_full_pool_evicts_the_youngest_and_its_words_stay_the_same() -> None:
    made = engine(superpages=10)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8))
    seen, words, preemptions = [], dict[str, list[int]](a=[], b=[]), 0
    for _ in turns(made):
        batch = made.scheduler.schedule()
        seen.append(pieces(batch))
        assert batch is not None
        output = made.scheduler.commit(made.execute(batch))
        preemptions += output.stats.num_preemptions
        for update in output.updates:
            words[update.request_id] += update.new_token_ids
    assert preemptions == 1
    restart = next(step for step in seen[1:] if any(name == "b" and start == 0 for name, start, _ in step))
    assert restart == [("b", 0, 8)]  # 4 prompt tokens and those of its answer, once a has ended
    for name, max_tokens in (("a", 12), ("b", 8)):
        alone = engine()
        alone.scheduler.add(ask(name, 4, max_tokens=max_tokens))
        assert words[name] == [token for update in run(alone)[name] for token in update.new_token_ids]


def test_all_table_entries_come_again_after_a_preemption() -> None:
    made = engine(superpages=10)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8))
    first_pieces = []
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        first_pieces += [s for s in batch.sequences if s.request.request_id == "b" and s.start == 0]
        made.scheduler.commit(made.execute(batch))
    again: ScheduledSequence = first_pieces[1]
    assert {name: (new.first_index, len(new.pages)) for name, new in again.new_pages.items()} == {
        "global": (0, 4),
        "local": (0, 4),
    }
    assert len(again.output_token_ids) >= 4


def test_the_evicted_one_goes_before_those_that_came_later() -> None:
    made = engine(superpages=10, max_running=2)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8))
    made.scheduler.add(ask("c", 2, max_tokens=1))
    order = [name for step in steps(made) for name, start, _ in step if start == 0]
    assert order == ["a", "b", "b", "c"]


def test_a_running_request_of_lower_priority_makes_way() -> None:
    made = engine(max_running=2)
    made.scheduler.add(ask("old", 2, max_tokens=9))
    made.scheduler.add(ask("young", 2, max_tokens=9))
    made.step()
    made.scheduler.add(ask("urgent", 2, max_tokens=2, priority=1))
    batch = made.scheduler.schedule()
    assert pieces(batch) == [("old", 2, 3), ("urgent", 0, 2)]
    assert batch is not None
    assert made.scheduler.commit(made.execute(batch)).stats.num_preemptions == 1


def test_equal_priority_never_makes_way() -> None:
    made = engine(max_running=1)
    made.scheduler.add(ask("a", 2, max_tokens=5))
    made.step()
    made.scheduler.add(ask("b", 2, max_tokens=5))
    assert {name for step in steps(made)[:4] for name, _, _ in step} == {"a"}


def test_a_large_prompt_that_waits_for_memory_is_not_overtaken() -> None:
    made = engine(superpages=14)
    made.scheduler.add(ask("a", 8, max_tokens=8))
    made.step()
    made.scheduler.add(ask("large", 16, max_tokens=1))
    made.scheduler.add(ask("small", 1, max_tokens=1))
    order = [name for step in steps(made) for name, start, _ in step if start == 0]
    assert order == ["large", "small"]


def test_a_prompt_starts_only_when_all_its_tokens_find_room() -> None:
    """Else its pieces would fill the pool and be evicted half computed."""
    made = engine(superpages=18)
    made.scheduler.add(ask("a", 8, max_tokens=6))
    made.step()
    made.scheduler.add(ask("b", 24, max_tokens=1))
    assert made.scheduler.kv.num_available > 5  # its first piece alone would fit
    seen = steps(made)
    assert [step for step in seen if step[0][0] == "b"] == [[("b", 0, 8)], [("b", 8, 16)], [("b", 16, 24)]]
    assert all(len(step) == 1 for step in seen)


def test_a_newcomer_leaves_each_running_one_its_next_page() -> None:
    """Two pages are free when b comes: it would fill both, and a's next page would be taken from it."""
    made = engine(superpages=6)
    made.scheduler.add(ask("a", 4, max_tokens=6))
    made.step()
    made.scheduler.add(ask("b", 3, max_tokens=1))
    assert [[name for name, _, _ in step] for step in steps(made)] == [["a"]] * 5 + [["b"]]


def test_a_prompt_without_pages_waits_for_younger_decodes_to_end() -> None:
    """d outgrows the page kept for it while the long prompt p is computed. Evicting d would lose its work; it ends soon anyway."""
    made = engine(superpages=20, max_tokens_per_step=5)
    made.scheduler.add(ask("p", 32, max_tokens=1))
    made.scheduler.add(ask("d", 1, max_tokens=8))
    seen, preemptions = [], 0
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        seen.append([name for name, _, _ in pieces(batch)])
        preemptions += made.scheduler.commit(made.execute(batch)).stats.num_preemptions
    assert preemptions == 0
    assert seen == [["p"], ["p", "d"], *[["d", "p"]] * 5, *[["d"]] * 2, ["p"]]


def test_a_worse_prompt_does_not_take_the_pages_a_better_one_waits_for() -> None:
    """In step 8 too little is free for p's last piece, but enough for e's. What the decodes give back later must come to p first."""
    made = engine(superpages=70, max_tokens_per_step=18, max_context=100)
    for name, prompt_len, max_tokens in (("p", 64, 1), ("e", 59, 1), ("d0", 1, 8), ("d1", 1, 8)):
        made.scheduler.add(ask(name, prompt_len, max_tokens=max_tokens, max_total_tokens=100))
    names = [[name for name, _, _ in step] for step in steps(made)]
    assert names == [["p", "e", "d0", "d1"], *[["d0", "d1", "p", "e"]] * 6, ["d0", "d1"], ["p", "e"]]
