"""What stands several chunks back is seen, and as transformers sees it: a passage that comes again, and a word told long before it is asked for.

Local layers see 512 tokens; only the seven global layers can carry these. The card of the checkpoint has the same experiment on held-out text: 0.92
nats a token on a passage repeated 1,100 tokens later, 2.46 with the global layers cut to the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from helpers.profile import FULL
from helpers.smol import cut_nope, encode, open_llm
from l4core import LLM, SamplingParams
from l4core.demo.ask import long_text
from l4core.demo.run import ready_checkpoint

CHUNK = 512
PASSAGE, WARM_UP, GAP = 200, 20, 1_100
NEEDLES = (("Anna", "marble"), ("Peter", "castle"), ("Clara", "violin"), ("Henry", "anchor"))[: 4 if FULL else 1]
pytestmark = pytest.mark.timeout(3600)


@dataclass(frozen=True)
class Case:
    """ids: all tokens.  repeated: positions of the second occurrence, without its first tokens.  word: position of the word asked for."""

    ids: list[int]
    repeated: range
    word: int


@pytest.fixture(scope="module")
def smol() -> Path:
    return ready_checkpoint()


def case_of(llm: LLM, number: int) -> Case:
    """A passage, a needle, other text, the passage again 1,100 tokens after its end, the question."""
    name, word = NEEDLES[number]
    text = encode(llm, long_text())
    text = text[200 * number :] + text[: 200 * number]
    needle = encode(llm, f"\n\nThe code word of {name} is {word}. Remember: the code word of {name} is {word}.\n\n")
    other = (text[PASSAGE:] * 2)[: GAP - len(needle)]
    passage, question, answer = text[:PASSAGE], encode(llm, f"\n\nThe code word of {name} is"), encode(llm, f" {word}")
    assert len(answer) == 1
    bos = llm._built.model_config.bos_token_id
    assert bos is not None
    begin = [bos, *passage, *needle, *other, *passage]
    again = range(len(begin) - PASSAGE + WARM_UP, len(begin))
    assert again.start - PASSAGE > 2 * CHUNK
    ids = [*begin, *question, *answer]
    return Case(ids=ids, repeated=again, word=len(ids) - 1)


def logprobs(llm: LLM, case: Case) -> torch.Tensor:
    """float32 [n − 1]: of each token but the first, given those before it."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([case.ids], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    entries = zip(output.prompt_logprobs[1:], case.ids[1:], strict=True)
    return torch.tensor([entry[token] for entry, token in entries if entry is not None])


def loss(found: torch.Tensor, case: Case) -> float:
    """Nats a token on the second occurrence."""
    return -float(found[[position - 1 for position in case.repeated]].mean())


@pytest.fixture(scope="module")
def found(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, torch.Tensor, torch.Tensor]]:
    """Case, its log-probabilities by the model, and with the global layers cut to the chunk."""
    llm = open_llm(smol)
    cases = [case_of(llm, number) for number in range(len(NEEDLES))]
    whole = [logprobs(llm, case) for case in cases]
    llm.close()
    cut = open_llm(cut_nope(smol, tmp_path_factory.mktemp("cut") / "model"))
    return [(case, one, logprobs(cut, case)) for case, one in zip(cases, whole, strict=True)]


def test_a_passage_that_comes_again_is_remembered_by_the_global_layers(
    found: list[tuple[Case, torch.Tensor, torch.Tensor]],
) -> None:
    for case, whole, cut in found:
        assert loss(whole, case) < 2.3
        assert loss(cut, case) > loss(whole, case) + 0.8


def test_a_word_told_three_chunks_back_is_recalled_by_the_global_layers(
    found: list[tuple[Case, torch.Tensor, torch.Tensor]],
) -> None:
    """Its probability: a half or more, and one in ten thousand without them."""
    for case, whole, cut in found:
        assert whole[case.word - 1] > -0.7
        assert cut[case.word - 1] < -9


def test_both_equal_transformers(smol: Path, found: list[tuple[Case, torch.Tensor, torch.Tensor]]) -> None:
    from transformers import Llama4ForCausalLM

    oracle = Llama4ForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    for case, whole, _ in found:
        asked = torch.tensor([*case.repeated, case.word])
        with torch.inference_mode():
            logits = oracle(torch.tensor([case.ids]), use_cache=False, logits_to_keep=asked - 1).logits[0]
        theirs = logits.log_softmax(-1)[torch.arange(len(asked)), torch.tensor(case.ids)[asked]]
        ours = whole[asked - 1]
        assert (ours - theirs).abs().max() <= 1e-3
        assert abs(float((ours - theirs)[:-1].mean())) <= 1e-4
