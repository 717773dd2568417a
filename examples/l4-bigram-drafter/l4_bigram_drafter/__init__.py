"""The package's hook. Found through its entry point; imports no torch."""

from l4core.plugin_api import DrafterEntry, hookimpl


@hookimpl
def l4_drafters() -> list[DrafterEntry]:
    return [
        DrafterEntry(
            name="bigram",
            api=1,
            create="l4_bigram_drafter.drafter:create",
            options={"entries": "tokens whose successor is remembered, default 65536"},
        )
    ]
