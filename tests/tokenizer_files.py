"""Small Transformers tokenizers, made on the spot."""

from pathlib import Path

END, PAD, MASK = "<|end|>", "<|pad|>", "<|mask|>"


def save_bpe(folder, size=270, **special):
    """A byte-level BPE of `size` tokens in a folder; its end token is 0, `special` names its other ones."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, *special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat and the hat " * 9], trainer)
    special = special or {"eos_token": END}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(str(folder))
    return Path(folder)
