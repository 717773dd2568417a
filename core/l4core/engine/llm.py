"""The offline API: `LLM(model=...).generate(prompts, SamplingParams(...))`. The engine runs in this process, or with `tp` in one a rank; prompts of
any number are batched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from l4core.chat.assemble import Assembler
from l4core.config import EngineConfig, from_mapping
from l4core.engine.engine import Engine
from l4core.engine.frontend import Frontend
from l4core.engine.inbox import Inbox
from l4core.engine.pace import paced
from l4core.engine.process.remote import RemoteBuilt, build_remotely
from l4core.engine.start.build import BuiltEngine, build_engine
from l4core.errors import ConfigError, RequestError
from l4core.request import CompletionOutput, Request, RequestOutput, SamplingParams, SequenceUpdate

Prompt = str | Sequence[int]
PROMPTS = "a string, a list of strings, or a list of token-id lists"


class LLM:
    """One model in this process; with `tp` above 1 in processes of its own, one a rank, that end with it.

    model: folder or hub id.  options: every field of EngineConfig by its own name or an alias (`max_model_len`, `seed`, …); an unknown
    one is a ConfigError that names the nearest.
    """

    def __init__(self, model: str | None = None, *, progress: bool = True, **options: Any) -> None:
        given = dict(options) if model is None else {"model": model, **options}
        config, server = from_mapping(given)
        if server != type(server)():
            raise ConfigError(
                "LLM() takes engine options only; found one of the HTTP server", fix="l4 serve takes those"
            )
        self.config: EngineConfig = config
        self._open: BuiltEngine | RemoteBuilt | None = (
            build_engine(config, progress=progress) if config.tp == 1 else build_remotely(config)
        )
        self._frontend = Frontend.from_plugins(
            config, self._built.model_config, self._built.folder, self._built.plugins
        )
        self._ids = itertools.count()

    @property
    def report(self) -> tuple[str, ...]:
        """The start-up block: model, dtype, backend, KV, largest context."""
        return tuple(self._built.report)

    @property
    def context_length(self) -> int:
        """Largest prompt + answer, in tokens."""
        return self._built.context_length

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """The checkpoint's generation defaults (`--sampling-defaults`), with changes."""
        return SamplingParams(**{**self._frontend.default_params(), **changes})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. prompts: a string, a list of strings, or a list of token-id lists.

        Raises RequestError for a bad prompt or parameter before anything is computed.
        """
        texts = _as_list(prompts)
        ids = [self._frontend.text_ids(p) if isinstance(p, str) else list(p) for p in texts]
        return self._run(ids, [p if isinstance(p, str) else None for p in texts], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]] | Sequence[Sequence[Mapping[str, object]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers to one conversation (a list of messages) or to many (a list of such lists)."""
        many: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        ids = [self._frontend.chat_ids(conversation) for conversation in many]
        return self._run(ids, [None] * len(ids), sampling_params, use_tqdm)

    def close(self) -> None:
        """Give the model's memory back. The object is of no use afterwards."""
        made, self._open = self._open, None
        if isinstance(made, RemoteBuilt):
            made.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _built(self) -> BuiltEngine | RemoteBuilt:
        if self._open is None:
            raise ConfigError("this LLM is closed", fix="make another: LLM(model=...)")
        return self._open

    def _run(
        self,
        prompts: list[list[int]],
        texts: Sequence[str | None],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        jobs = [
            _Job(self._frontend, str(next(self._ids)), ids, text, p, self.context_length)
            for ids, text, p in zip(prompts, texts, self._params_for(params, len(prompts)), strict=True)
        ]
        requests = [r for job in jobs for r in job.requests]
        for request in requests:
            self._built.engine.check(request)
        self._drive({r.request_id: job for job in jobs for r in job.requests}, requests, use_tqdm)
        return [job.output() for job in jobs]

    def _drive(self, jobs: Mapping[str, _Job], requests: Sequence[Request], use_tqdm: bool) -> None:
        """Step until every request ended. Leaving early (an error, Ctrl-C) aborts what is unfinished, so the engine stays usable."""
        engine, unfinished = self._built.engine, {r.request_id for r in requests}
        inbox, is_here = (
            Inbox(requests=requests),
            isinstance(engine, Engine),
        )  # the ranks of a remote one pace themselves
        step = paced(engine, self.config.itl_target_ms if is_here else None, self._built.drafts)
        try:
            with tqdm(total=len(requests), unit="seq", disable=not use_tqdm or len(requests) < 8) as bar:
                while unfinished:
                    output = step(inbox)
                    aborts = []
                    for update in output.updates:
                        if update.request_id not in unfinished:  # the end of one that an earlier call gave up
                            continue
                        if jobs[update.request_id].feed(update):
                            unfinished.discard(update.request_id)
                            bar.update()
                            aborts += [update.request_id] if update.finish_reason is None else []
                    inbox = Inbox(aborts=aborts)
        finally:
            if unfinished or inbox.aborts:
                engine.abort([*unfinished, *inbox.aborts])

    def _params_for(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            return [self.default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, (list, tuple)) or not all(isinstance(p, SamplingParams) for p in params):
            raise ConfigError(f"sampling_params is {params!r:.200}; wanted a SamplingParams, or one for each prompt")
        if len(params) != count:
            raise ConfigError(f"{count} prompts but {len(params)} sampling_params; wanted one, or one for each prompt")
        return list(params)


class _Job:
    """One prompt: its n requests and their assemblers."""

    def __init__(
        self,
        frontend: Frontend,
        job_id: str,
        prompt: list[int],
        text: str | None,
        params: SamplingParams,
        context_length: int,
    ) -> None:
        self.requests = frontend.requests(job_id, prompt, params, context_length)
        self._id, self._prompt, self._text = job_id, prompt, text
        self._assemblers: dict[str, Assembler] = {r.request_id: frontend.assembler(r) for r in self.requests}

    def feed(self, update: SequenceUpdate) -> bool:
        """→ whether this sequence is over (ended by the engine, or by a stop string)."""
        return self._assemblers[update.request_id].feed(update).finish_reason is not None

    def output(self) -> RequestOutput:
        assemblers = list(self._assemblers.values())
        outputs: list[CompletionOutput] = [a.output(index) for index, a in enumerate(assemblers)]
        return RequestOutput(
            request_id=self._id,
            prompt=self._text,
            prompt_token_ids=self._prompt,
            outputs=outputs,
            prompt_logprobs=assemblers[0].prompt_logprobs(),
            num_cached_tokens=assemblers[0].num_cached_tokens,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many → many. Raises RequestError for what is neither text nor token ids (an array, say: `tolist()` makes it a list)."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise RequestError(f"prompts is a {type(prompts).__name__}; wanted {PROMPTS}", param="prompt")
    many: list[Prompt] = [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)
    for index, prompt in enumerate(many):
        if not isinstance(prompt, (str, list, tuple)):
            raise RequestError(f"prompts[{index}] is a {type(prompt).__name__}; wanted {PROMPTS}", param="prompt")
    return many
