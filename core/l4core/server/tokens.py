"""POST /tokenize and /detokenize, in the shape vLLM gave them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from l4core.errors import RequestError
from l4core.server.chat import chat_ids
from l4core.server.failures import json_response
from l4core.server.limits import read_request
from l4core.server.protocol import DetokenizeRequest, TokenizeRequest
from l4core.server.replies import Text, Tokens
from l4core.server.service import Service, off_loop_if_long, text_ids


async def tokenize(service: Service, http: Request) -> Response:
    """Ids of a prompt, or of messages as the chat template renders them. A text that cannot fit into the context is refused, as it is everywhere."""
    body = await read_request(http, TokenizeRequest, service.max_body_bytes)
    service.check_model(body.model)
    ids = await _ids(service, body)
    spelled = None
    if body.return_token_strs:
        tokenizer = service.loaded.frontend.tokenizer
        spelled = await off_loop_if_long(len(ids), lambda: [tokenizer.token(i) or "" for i in ids])
    return json_response(
        Tokens(count=len(ids), max_model_len=service.loaded.context_length, tokens=ids, token_strs=spelled)
    )


async def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    text = body.prompt
    if (text is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        if body.add_special_tokens:
            raise RequestError("the chat template adds its own special tokens", param="add_special_tokens")
        return await chat_ids(service, body.messages)
    assert text is not None
    frontend, add_special = service.loaded.frontend, body.add_special_tokens is not False
    frontend.check_length(len(text), service.loaded.context_length, param="prompt")
    return await off_loop_if_long(len(text), lambda: text_ids(frontend, text, add_special=add_special))


async def detokenize(service: Service, http: Request) -> Response:
    """Text of ids; special tokens are shown unless skip_special_tokens."""
    body = await read_request(http, DetokenizeRequest, service.max_body_bytes)
    service.check_model(body.model)
    tokenizer = service.loaded.frontend.tokenizer

    def decode() -> str:
        wrong = next((i for i in body.tokens if not 0 <= i < tokenizer.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is outside 0 … {tokenizer.vocab_size - 1}", param="tokens")
        return tokenizer.decode(body.tokens, skip_special=bool(body.skip_special_tokens))

    return json_response(Text(await off_loop_if_long(4 * len(body.tokens), decode)))
