"""The files of a Transformers folder or hub repository beside its weights, and how a repository is fetched."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbconvert.errors import DBConvertError
from dbconvert.files import inside

CONFIG = "config.json"
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "*.model",
    "spiece*", "normalizer.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor*.json", "video_preprocessor*.json", "video_processor*.json", "feature_extractor*.json",
    "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
"""What belongs to a model beside configuration, code and weights: it is kept as it is."""
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
STATE_DICTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def companions(folder: Path) -> list[str]:
    """Names of the files that belong to the model and are neither its configuration, code nor weights.

    Raises:
        DBConvertError: one is a link that leads elsewhere.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() or path.is_symlink())
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)]
    for name in found:
        inside(folder, name)
    return found


def copy_files(names: list[str] | tuple[str, ...], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(source, name), target / name)


def fetch(repository: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a hub repository's snapshot in the cache, with the files of these patterns in it.

    Raises:
        DBConvertError: the hub does not know it, or cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    with quiet():
        try:
            return Path(snapshot_download(repository, allow_patterns=list(patterns)))
        except Exception as error:
            raise DBConvertError(
                f"cannot fetch {repository} from the hub",
                why=str(error).strip().split("\n", 1)[0],
                hint="check the name and the connection, or give a local folder",
            ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and remarks of Transformers and of the hub's client are off meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
