"""A small GPT and a text that it can learn, as files."""

from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
FOX = "the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60
QUICK = ["train.steps=4", "train.batch=8", "data.length=16", "eval.draws=1", "eval.sigmas=2", "log.every=1"]


def write_text(folder):
    (folder / "fox.txt").write_text(FOX)


def write_gpt(folder, depth):
    """gpt.py of so many layers, 16 wide, and fox.txt beside it."""
    source = (EXAMPLES / "gpt.py").read_text()
    (folder / "gpt.py").write_text(source.replace("depth=6, width=96, heads=4", f"depth={depth}, width=16, heads=2"))
    write_text(folder)


def corpus_in(folder, *quick):
    """Overrides that train on fox.txt."""
    return [*(quick or QUICK), f"data.source={folder / 'fox.txt'}", "data.tokenizer=char"]
