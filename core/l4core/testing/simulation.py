"""A model of integers for tests above the tensors: it reads its context through pages and tables, so wrong accounting changes its words.

Runs without torch. The next token is a hash of the tokens found in KV memory: all of them in the global group, those of the last token's chunk
in the local group. Freed pages are poisoned, and every read is compared with the true token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from l4core.engine.batch import PENDING, Draft, DraftRequest, DrawnTokens, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.schedule.scheduler import Scheduler, SchedulerLimits
from l4core.engine.schedule.stops import forbidden_token_ids
from l4core.kv.blocks import NULL_PAGE, KVGroup
from l4core.kv.manager import KVManager
from l4core.kv.superpages import superpage_shape
from l4core.request import Request, StepOutput, TokenLogprobs
from l4core.sampling.verify import accepted_path


def next_token(
    groups: Iterable[KVGroup], tokens: Sequence[int], vocab_size: int, forbidden: Collection[int] = ()
) -> int:
    """What the model of integers says after `tokens`, seen whole: the oracle that knows no pages."""
    seen = [
        tokens if g.chunk_size is None else tokens[(len(tokens) - 1) // g.chunk_size * g.chunk_size :] for g in groups
    ]
    return _say(seen, vocab_size, forbidden)


def _say(seen: Sequence[Sequence[int]], vocab_size: int, forbidden: Collection[int]) -> int:
    digest = blake2b(repr([list(tokens) for tokens in seen]).encode(), digest_size=8).digest()
    allowed = [token for token in range(vocab_size) if token not in forbidden]
    return allowed[int.from_bytes(digest, "little") % len(allowed)]


def output_alone(groups: Sequence[KVGroup], request: Request, vocab_size: int) -> list[int]:
    """The whole answer to `request`, by the oracle."""
    params, prompt = request.params, list(request.prompt_token_ids)
    ends, output = {*request.eos_token_ids, *params.stop_token_ids}, list[int]()
    most = min(params.max_tokens or request.max_total_tokens, request.max_total_tokens - len(prompt))
    while len(output) < most:
        forbidden = forbidden_token_ids(request, len(output))
        output.append(next_token(groups, prompt + output, vocab_size, forbidden))
        if output[-1] in ends:
            break
    return output


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One KV slot in use: who wrote it, and all tokens up to its own, on which keys and values depend (as a hash)."""

    owner: str
    position: int
    token: int
    context: int


class SimulatedMemory:
    """Pages of cells per group, None = poison; and the persistent block tables, a local row being a ring of two chunks."""

    def __init__(self, groups: Sequence[KVGroup], page_size: int, num_superpages: int, limits: SchedulerLimits) -> None:
        self.groups, self.page_size = groups, page_size
        self.shape = superpage_shape(groups)
        self.cells: dict[str, list[list[_Cell | None]]] = {
            g.name: [[None] * page_size for _ in range(num_superpages * self.shape.pages[g.name])] for g in groups
        }
        self.num_written = 0
        self.guessed: set[str] = set()  # owners whose slots may hold refused guesses
        columns = {
            g.name: (2 * g.chunk_size if g.chunk_size else limits.max_context + page_size) // page_size for g in groups
        }
        self.tables = {
            name: [[NULL_PAGE] * count for _ in range(limits.max_running)] for name, count in columns.items()
        }

    def poison(self, group: str, pages: Sequence[int]) -> None:
        """Forget what the pages hold; reading them is an error from now on."""
        for page in pages:
            assert page != NULL_PAGE, "the null page was freed"
            self.cells[group][page] = [None] * self.page_size

    def enter(self, seq: ScheduledSequence | DraftRequest) -> None:
        """Write the block-table entries the scheduler sent."""
        for name, new in seq.new_pages.items():
            row = self.tables[name][seq.row]
            for index, page in enumerate(new.pages, start=new.first_index):
                row[index % len(row)] = page

    def write(self, seq: ScheduledSequence) -> None:
        """The piece's tokens into their slots. A slot in use, or a page another request writes, is an error."""
        owner, known = seq.request.request_id, _known(seq)
        if seq.num_drafts:
            self.guessed.add(owner)
        self.num_written += len(seq.token_ids)
        for group in self.groups:
            for position, token in enumerate(seq.token_ids, start=seq.start):
                page = self._page(group.name, seq.row, position)
                assert page >= self.shape.pages[group.name], f"{owner}: position {position} has no {group.name} page"
                self._check_use(group, page)
                cells, offset = self.cells[group.name][page], position % self.page_size
                assert all(cell is None or cell.owner == owner for cell in cells), (
                    f"two writers of {group.name} page {page}"
                )
                assert cells[offset] is None or owner in self.guessed, (
                    f"{owner}: {group.name} position {position} written twice"
                )
                cells[offset] = _cell(owner, known, position)
                assert token == known[position]

    def read(self, group: KVGroup, seq: ScheduledSequence, end: int | None = None) -> list[int]:
        """Tokens that the token before `end` (default: the piece's last) sees. A poisoned cell, or one of another, is an error."""
        end = seq.start + len(seq.token_ids) if end is None else end
        begin = (end - 1) // group.chunk_size * group.chunk_size if group.chunk_size else 0
        assert seq.start >= begin or seq.num_drafts, (
            f"{seq.request.request_id}: the piece [{seq.start}, {end}) crosses a chunk border"
        )
        known, found = _known(seq), []
        for position in range(begin, end):
            cell = self.cells[group.name][self._page(group.name, seq.row, position)][position % self.page_size]
            wanted = _cell(
                cell.owner if cell else "", known, position
            )  # a cached prefix has another's pages of the same tokens
            assert cell == wanted, f"{group.name}: found {cell}, wanted {wanted}"
            found.append(wanted.token)
        return found

    def _check_use(self, group: KVGroup, page: int) -> None:
        """The bytes of a superpage in use as one group's pages are no other group's."""
        superpage = page // self.shape.pages[group.name]
        for other in self.groups:
            if other is not group:
                per = self.shape.pages[other.name]
                cells = self.cells[other.name][superpage * per : (superpage + 1) * per]
                assert not any(cell for page in cells for cell in page), (
                    f"{group.name} page {page} overlaps {other.name} pages"
                )

    def _page(self, group: str, row: int, position: int) -> int:
        columns = self.tables[group][row]
        return columns[position // self.page_size % len(columns)]


def _known(seq: ScheduledSequence) -> list[int]:
    guesses = seq.token_ids[len(seq.token_ids) - seq.num_drafts :]
    return [*seq.request.prompt_token_ids, *seq.output_token_ids, *guesses]


def _cell(owner: str, known: Sequence[int], position: int) -> _Cell:
    return _Cell(owner=owner, position=position, token=known[position], context=hash(tuple(known[: position + 1])))


class SimulatedEngine:
    """Scheduler + memory + the model of integers, with the step of the real engine."""

    def __init__(
        self,
        groups: Sequence[KVGroup],
        *,
        page_size: int,
        num_superpages: int,
        max_running: int,
        max_tokens_per_step: int,
        max_context: int,
        vocab_size: int = 8,
        failing: Collection[str] = (),
        prefix_cache: bool = True,
        num_drafts: int = 0,
        max_local: int | None = None,
        overlapped: bool = False,
        as_columns: bool = True,
    ) -> None:
        """num_superpages: the null one among them.  failing: ids of requests whose first draw fails.
        num_drafts: guesses a step, most of them right.  max_local: superpages of local pages at most.
        overlapped: each step is scheduled before the tokens of the one before are known; without drafts.
        as_columns: tokens of decodes come as such, as they do where all of a step are drawn by kernels; False = as draws one by one."""
        chunk_size = next((g.chunk_size for g in groups if g.chunk_size is not None), None)
        limits = SchedulerLimits(
            max_running=max_running,
            max_tokens_per_step=max_tokens_per_step,
            chunk_size=chunk_size,
            max_context=max_context,
        )
        self.memory = SimulatedMemory(groups, page_size, num_superpages, limits)
        kv = KVManager(
            groups,
            page_size,
            num_superpages,
            prefix_cache=prefix_cache,
            max_local=max_local,
            on_empty=self.memory.poison,
        )
        self.scheduler = Scheduler(limits, kv, max_in_flight=2 if overlapped else 1)
        self.overlapped, self._executed = overlapped, deque[StepTokens]()
        self.groups, self.vocab_size, self.failing = groups, vocab_size, failing
        self.num_drafts, self.as_columns = num_drafts, as_columns
        self._last_tokens: dict[int, int] = {}

    def step(self) -> StepOutput:
        """Propose, schedule, execute, commit; overlapped, the commit is that of the step before."""
        batch = self.scheduler.schedule(self.propose())
        return self.scheduler.commit(self.turn(None if batch is None else self.execute(batch)))

    def turn(self, executed: StepTokens | None) -> StepTokens | None:
        """What to commit after this was executed."""
        if not self.overlapped:
            return executed
        due = self._executed.popleft() if self._executed else None
        if executed is not None:
            self._executed.append(executed)
        return due

    def propose(self) -> dict[str, Draft]:
        """A chain for every sequence that can take one. Guess i of a sequence of n tokens is wrong when n + i is a multiple of 4."""
        drafts = {}
        for wanted in self.scheduler.draftable(self.num_drafts) if self.num_drafts else ():
            self.memory.enter(wanted)
            tokens = [*wanted.request.prompt_token_ids, *wanted.output_token_ids]
            for _ in range(wanted.max_drafts):
                true = next_token(self.groups, tokens, self.vocab_size)
                tokens.append((true + (len(tokens) % 4 == 0)) % self.vocab_size)
            drafts[wanted.request.request_id] = Draft(token_ids=tokens[wanted.num_tokens :])
        return drafts

    def execute(self, batch: ScheduledBatch) -> StepTokens:
        """What the device would do: all writes, then all reads. It knows the token a row drew last, which the host may not."""
        for seq in batch.sequences:
            self.memory.enter(seq)
        sequences = [self._with_last_token(seq) for seq in batch.sequences]
        for seq in sequences:
            self.memory.write(seq)
        drawn = [self._draw(seq) for seq in sequences]
        self._last_tokens |= {
            seq.row: one.token_ids[-1] for seq, one in zip(sequences, drawn, strict=True) if one.token_ids
        }
        if not self.as_columns:
            return StepTokens(drawn=drawn)
        num = len(batch.decodes.states)
        decoded = [PENDING if one.error or one.logprobs else one.token_ids[0] for one in drawn[:num]]
        away = [one for one, token_id in zip(drawn, decoded, strict=False) if token_id == PENDING]
        return StepTokens(decoded=decoded, drawn=[*away, *drawn[num:]])

    def _with_last_token(self, seq: ScheduledSequence) -> ScheduledSequence:
        if seq.token_ids[0] != PENDING:
            return seq
        last = self._last_tokens[seq.row]
        return msgspec.structs.replace(seq, token_ids=[last], output_token_ids=[*seq.output_token_ids, last])

    def _draw(self, seq: ScheduledSequence) -> DrawnTokens:
        request_id, end = seq.request.request_id, seq.start + len(seq.token_ids)
        ends = range(end - seq.num_drafts, end + 1)
        seen = [[self.memory.read(group, seq, at) for group in self.groups] for at in ends]
        if seq.draws and request_id in self.failing:
            return DrawnTokens(request_id=request_id, error="the sampler failed")
        drawn = [
            _say(tokens, self.vocab_size, forbidden_token_ids(seq.request, len(seq.output_token_ids) + row))
            for row, tokens in enumerate(seen)
        ]
        path = accepted_path(seq.token_ids[len(seq.token_ids) - seq.num_drafts :], seq.parents, drawn)
        wants_logprobs = seq.request.params.logprobs is not None
        return DrawnTokens(
            request_id=request_id,
            token_ids=[drawn[row] for row in path] if seq.draws else (),
            logprobs=[_logprobs(0, 0) for _ in path] if seq.draws and wants_logprobs else (),
            prompt_logprobs=_prompt_logprobs(seq),
        )


def _prompt_logprobs(seq: ScheduledSequence) -> list[TokenLogprobs | None]:
    """Entries of a piece: prompt position i has the made-up logprob −i, position 0 has none."""
    if seq.request.params.prompt_logprobs is None:
        return []
    prompt = seq.request.prompt_token_ids
    positions = range(seq.start + 1, min(seq.start + len(seq.token_ids) + 1, len(prompt)))
    entries = [_logprobs(prompt[i], i) for i in positions]
    return [None, *entries] if seq.start == 0 else [*entries]


def _logprobs(token_id: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=-float(position), rank=1)
