"""CLIP's byte-pair tokenizer, from the vocabulary file that ships inside open_clip; no network.

The `tokenizers` library does the work; ids equal those of transformers' CLIPTokenizer.
"""

import gzip
import importlib.util
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ldm.errors import UserError
from ldm.texts import readable

START, END = 49406, 49407  # ids of <|startoftext|> and <|endoftext|>; SD 1.x pads with END
VOCAB_SIZE = 49408
MAX_LENGTH = 77

_MERGES = VOCAB_SIZE - 2 * 256 - 2  # lines of the merges file that CLIP uses
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@lru_cache(maxsize=1)
def clip_tokenizer() -> Tokenizer:
    """Build the tokenizer of CLIP's text encoder (Radford et al. 2021); adds no special tokens."""
    lines = gzip.decompress(_merges_file().read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : _MERGES + 1])]
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}

    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenize(text: str) -> list[int]:
    """Return the token ids of a text, without start, end and padding.

    Raises:
        UserError: it holds bytes that are no characters, as a shell of another encoding gives them.
    """
    if readable(text) != text:
        raise UserError(f"the text '{readable(text)}' is not UTF-8: type it on a terminal, or save it in a file, that is")
    return list(_ids(text))


@lru_cache(maxsize=4096)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(clip_tokenizer().encode(text, add_special_tokens=False).ids)


def decode(ids: list[int]) -> str:
    """Return the text of token ids, a space behind each word."""
    return clip_tokenizer().decode(ids, skip_special_tokens=False).replace("</w>", " ").strip()


def frame(ids: list[int], length: int = MAX_LENGTH) -> list[int]:
    """Put token ids between START and END and pad with END to `length`; too many are cut."""
    ids = [START, *ids[: length - 2], END]
    return ids + [END] * (length - len(ids))


def _merges_file() -> Path:
    package = importlib.util.find_spec("open_clip")  # found, not imported: importing it takes seconds
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "the package open_clip_torch, which holds CLIP's vocabulary, is missing: pip install open_clip_torch"
        )
    return Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def _byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(others)]
