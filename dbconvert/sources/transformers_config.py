"""Configurations and classes of Transformers networks, its own and those that bring code along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from dbconvert.errors import DBConvertError
from dbconvert.files import inside
from dbconvert.schema import identity
from dbconvert.sources.python_files import sha256_files
from dbconvert.sources.transformers_files import quiet

FALLBACK = "write a model.py that builds the network"


def read_settings(path: Path, location: str) -> dict[str, Any]:
    """config.json as it stands there."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise unreadable(location, error) from None
    return settings


def read_config(folder: Path, location: str, *, trust: bool) -> Any:
    import transformers

    with quiet():
        try:
            return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
        except Exception as error:
            raise unreadable(location, error) from None


def unreadable(location: str, error: Exception) -> DBConvertError:
    return DBConvertError(
        f"cannot read a Transformers configuration from {location}",
        why=first_line(error),
        hint="give a folder with config.json, a hub id, or a model.py",
    )


def first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])


def refuse_quantised(settings: dict[str, Any], location: str) -> None:
    quantisation = settings.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise DBConvertError(
            f"the weights of {location} are quantised ({method or 'method not named'})",
            why="quantised weights cannot be trained, and their layers are not the network's own",
            hint="give the checkpoint that it was made from, in 32 or 16 bit",
        )


def known(settings: dict[str, Any], name: str | None) -> bool:
    """Whether Transformers itself has the configuration and the architecture."""
    import transformers

    models = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    return settings.get("model_type") in models and name is not None and hasattr(transformers, name)


def architecture(name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise DBConvertError(
            f"the installed Transformers {transformers.__version__} has no {name}", hint=f"update it, or {FALLBACK}"
        )
    return cls


def trusted_class(folder: Path, settings: dict[str, Any], name: str) -> Any:
    """The class that a configuration brings code for, else Transformers' own of that name."""
    reference = code_of(settings, name)
    return architecture(name) if reference is None else own_class(folder, reference)


def own_class(folder: Path, reference: str) -> Any:
    """A class from Python files of a folder, loaded by Transformers' own mechanism. It runs the code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with quiet():
        try:
            return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
        except Exception as error:
            raise DBConvertError(
                f"the code of {folder} cannot be loaded",
                where=reference,
                why=f"{type(error).__name__}: {first_line(error)}",
            ) from error


def code_identity(name: str, content: dict[str, Any], folder: Path | None, code: tuple[str, ...]) -> str:
    """What a plan knows a source by: architecture, configuration, and the content of its code where it brings any."""
    facts: dict[str, Any] = {"architecture": name, "config": content}
    if code and folder is not None:
        facts["code"] = sha256_files(folder, code)
    return identity(facts)


def plain_config(config: Any, *, everything: bool = False) -> dict[str, Any]:
    """What differs from the defaults of a configuration, or everything, as JSON data; nothing of this machine."""
    content = json.loads(config.to_json_string(use_diff=not everything))
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"):
        content.pop(key, None)
    return {"model_type": config.model_type, **content}


# -- code that comes with a model ---------------------------------------------------------------------------


def code_of(settings: dict[str, Any], name: str) -> str | None:
    """`module.Class` of a model class that a configuration brings its own code for, None where it brings none."""
    classes = [value for key, value in (settings.get("auto_map") or {}).items() if key.startswith("AutoModel")]
    own = [value for value in classes if isinstance(value, str) and value.rpartition(".")[2] == name]
    return own[0] if own else None


def code_files(folder: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    """The Python files that a configuration's `auto_map` names, with those of the folder that they import.

    Raises:
        DBConvertError: one is missing, or belongs to another repository.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[str] = set()
    for value in (settings.get("auto_map") or {}).values():
        for reference in value if isinstance(value, list) else [value]:
            if reference is None:
                continue
            if "--" in reference:
                raise DBConvertError(
                    f"the code of {folder} belongs to another repository: {reference.partition('--')[0]}",
                    hint="copy its .py files into the folder and take the name out of auto_map in config.json",
                )
            name = reference.rpartition(".")[0] + ".py"
            path = inside(folder, name)
            if not path.is_file():
                raise DBConvertError(f"{folder} lacks {name}, which its auto_map names")
            found.add(name)
            found.update(str(Path(other).relative_to(folder)) for other in get_relative_import_files(path))
    return tuple(sorted(found))


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """Modules that multiply by a matrix: torch's, and the transposed ones of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D
