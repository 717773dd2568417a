"""On a CPU the kernels run under Triton's interpreter, which must be asked for before Triton is imported. L4_TEST_DEVICE=cuda runs the same tests
on a GPU instead."""

from __future__ import annotations

import inspect
import os
from typing import Any

if os.environ.get("L4_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def _patch_once() -> None:
    """The interpreter replaces every function of triton.language at each call of a device function, 3 ms a call, though they are replaced already
    for the launch. Doing so once a launch makes these tests several times faster; what a kernel computes stays the interpreter's."""
    from triton.language import core
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        langs = [lang for lang in fn.__globals__.values() if inspect.ismodule(lang) and hasattr(lang, "tensor")]
        if any(core.is_builtin(lang.load) for lang in langs if hasattr(lang, "load")):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


if "TRITON_INTERPRET" in os.environ:
    _patch_once()
