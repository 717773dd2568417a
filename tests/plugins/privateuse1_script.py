"""Run in a process of its own, which then has a PrivateUse1 device: prints as JSON what selection, the engine and the kit do on it."""

from __future__ import annotations

import json
import sys

import torch

from l4core import LLM, SamplingParams
from l4core.attention.select import select_backend
from l4core.platform import detect
from l4core.plugin_api import AttentionRequirements
from l4core.plugin_manager import load_plugins
from l4core.testing.conformance import AttentionConformance, Heads
from l4core.testing.fake_device import NAME, register


class Kit(AttentionConformance):
    device = NAME
    heads = (Heads(num_q_heads=4, num_kv_heads=2, head_dim=16),)
    dtypes = (("float32", "float32"),)
    page_sizes, chunk, combinations = (16,), 64, 1


class Sdpa(Kit):
    plugin, backend = "l4core.builtin_plugins", "sdpa"


class HostSync(Kit):
    plugin, backend = "testing.wrong_backends", "host sync"


def selection() -> dict[str, object]:
    req = AttentionRequirements(
        num_q_heads=6, num_kv_heads=2, head_dim=16, q_dtype="float32", kv_dtype="float32", chunk_size=64
    )
    platform = detect("auto")
    selected = select_backend(load_plugins(), platform, req, device=NAME)
    return {"device_type": platform.device_type, "vendor": platform.vendor, "chosen": selected.entry.name}


def tokens(model: str, device: str) -> list[int]:
    with LLM(model=model, device=device, dtype="float32", context_length=256) as llm:
        (output,) = llm.generate(["Hello there"], SamplingParams(temperature=0, max_tokens=2))
    return list(output.outputs[0].token_ids)


def failure(kit: Kit, test: str, case: str) -> str:
    try:
        getattr(kit, test)(case)
    except AssertionError as error:
        return str(error)
    return ""


def kits() -> dict[str, str]:
    return {
        "sdpa: no host sync": failure(Sdpa(), "test_no_host_sync", "local decode"),
        "sdpa: definition": failure(Sdpa(), "test_equals_the_definition", "ragged prefill on a prefix"),
        "host sync: definition": failure(HostSync(), "test_equals_the_definition", "local decode"),
        "host sync: no host sync": failure(HostSync(), "test_no_host_sync", "local decode"),
    }


def syncs() -> dict[str, bool]:
    """Each way of reading a value, and whether the device tells."""
    x = torch.arange(4, device=NAME)
    reads = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "bool": lambda: bool(x.max() > 1),
        "mask": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "repeat": lambda: torch.repeat_interleave(x),
        "equal": lambda: torch.equal(x, x),
        "copied into a tensor of the host": lambda: torch.empty(4, dtype=torch.int64).copy_(x),
        "arithmetic": lambda: (x * 2).cumsum(0),
        "repeat into a known size": lambda: torch.repeat_interleave(x, output_size=6),
    }
    module = getattr(torch, NAME)
    found = {}
    for name, read in reads.items():
        module.set_sync_debug_mode("error")
        try:
            read()
            found[name] = False
        except RuntimeError as error:
            found[name] = "synchronizing" in str(error)
        finally:
            module.set_sync_debug_mode("default")
    return found


if __name__ == "__main__":
    register()
    result = {
        "selection": selection(),
        "tokens": {device: tokens(sys.argv[1], device) for device in ("cpu", NAME)},
        "kits": kits(),
        "syncs": syncs(),
    }
    print(json.dumps(result))
