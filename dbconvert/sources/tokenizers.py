"""Tokenizers of Transformers folders and hub ids, and what tells one from another."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dbconvert.errors import DBConvertError, UsageError
from dbconvert.sources.transformers_config import first_line
from dbconvert.sources.transformers_files import quiet

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab*", "*.model", "*.tiktoken", "spiece*")
HUB_NAME = re.compile(r"^\w[\w.-]*(/[\w.-]+)?$")


def load_tokenizer(location: str) -> Any:
    """A Transformers tokenizer from a folder or the hub. Code that a repository brings along is not run.

    Raises:
        UsageError: there is no such folder, or it holds no tokenizer.
        DBConvertError: it cannot be read, or the hub cannot give it.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        if not holds_tokenizer(folder):
            raise UsageError(f"{folder} holds no tokenizer", hint="give a folder with tokenizer.json, byte or char")
    elif folder.exists() or not HUB_NAME.match(location):
        raise UsageError(
            f"{location} is not a folder" if folder.exists() else f"there is no tokenizer {location}",
            hint="give byte, char, a Transformers folder or a hub id",
        )
    return read_tokenizer(str(folder) if folder.is_dir() else location)


def holds_tokenizer(folder: Path) -> bool:
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in FILES)


def read_tokenizer(location: str) -> Any:
    import transformers

    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        except Exception as error:  # of many kinds, all meaning that there is none to be had
            raise DBConvertError(
                f"cannot read a tokenizer from {location}",
                why=first_line(error),
                hint="give byte, char, a Transformers folder or a hub id",
            ) from None


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how text becomes tokens, equal for equal tokenizers.

    How a batch is padded or truncated is not part of it: every call changes that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"class": type(tokenizer).__name__} if backend is None else json.loads(backend.to_str())
    content = {
        "rules": {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")},
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
