"""Transformers models by name: hub names, folders, and folders that hold an adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def load_pretrained(auto_class: str, name: str) -> nn.Module:
    """A transformers model by Hugging Face name or local path; from an adapter's folder, its base under the adapter.

    The adapter of a ``PeftModel`` so loaded is trained, its base is not.

    Args:
        auto_class: Of transformers, for example ``"AutoModelForCausalLM"``.
        name: Hugging Face name or local path.

    Raises:
        FileNotFoundError: If there is no such model, or an adapter's base is not where the adapter says.
    """
    import transformers

    build: Any = getattr(transformers, auto_class)
    if not (Path(name) / "adapter_config.json").is_file():
        network: nn.Module = _found(build, name, f"There is no model {name!r}, neither a folder nor on the hub.")
        return network
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(name).base_model_name_or_path or ""
    missing = (
        f"{name!r} holds an adapter without its base, which it says is {base!r}. Bring the base there, or correct "
        "`base_model_name_or_path` in its adapter_config.json."
    )
    return PeftModel.from_pretrained(_found(build, base, missing), name, is_trainable=True)


def _found(build: Any, name: str, missing: str) -> Any:
    try:
        return build.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise  # something is there, and transformers says what is wrong with it
        raise FileNotFoundError(f"{missing} ({error})") from error
