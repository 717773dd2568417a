"""The package's hook. Found through its entry point on every start, so it imports nothing but the contract."""

from l4core.plugin_api import ChatTemplateEntry, hookimpl


@hookimpl
def l4_chat_templates() -> list[ChatTemplateEntry]:
    return [
        ChatTemplateEntry(
            name="chatml", api=1, create="l4_chatml_template.template:ChatMLTemplate", stop_tokens=("<|im_end|>",)
        )
    ]
