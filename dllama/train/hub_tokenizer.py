"""The tokenizer of a Hugging Face folder behind this project's interface, for training on what is not converted."""

from pathlib import Path

from transformers import AutoTokenizer

from dllama.errors import FileError


class HubTokenizer:
    """What training needs of ``dllama.tokenizer.Tokenizer``, by transformers. FileError where the folder has none."""

    def __init__(self, folder: Path):
        try:
            self._library = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise FileError(folder, f"holds no tokenizer that can be read ({str(error).splitlines()[0]})") from None
        self.bos_id = self._library.bos_token_id
        self.eos_ids = () if self._library.eos_token_id is None else (self._library.eos_token_id,)
        self.chat_template = self._library.chat_template
        names = self._library.all_special_tokens
        self.special = dict(zip(names, self._library.convert_tokens_to_ids(names), strict=True))
        self._has_bos = self.bos_id is not None and self._library("a").input_ids[:1] == [self.bos_id]

    @property
    def vocab_size(self) -> int:
        return len(self._library)

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of ``text``; see ``Tokenizer.encode``."""
        ids = self._library(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return [self.bos_id] * (bos and self._has_bos) + ids
