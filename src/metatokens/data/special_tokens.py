"""Names of the tokens that are no text, and which of them ends a document."""

from tokenizers import Tokenizer

from metatokens.errors import UsageError

META_TOKEN = "_PAUSE_"  # paper section 3: the designated meta-token of the tasks
END_OF_TEXT = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
# the first of these that a vocabulary has ends a document
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


def end_of_text_token(tokenizer: Tokenizer) -> str:
    """Return the token that ends a document: `<|endoftext|>`, or the vocabulary's equivalent.

    Raises:
        UsageError: The vocabulary has none of the known ones.
    """
    for token in _END_TOKENS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise UsageError(
        "tokenizer",
        expected=f"one of {', '.join(_END_TOKENS)} in the vocabulary",
        found="none",
        remedy="use a tokenizer with an end-of-text token",
    )
