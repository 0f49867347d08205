"""Text to token ids and back, with nothing but the checkpoint's own files."""

from offload_engine.text.chat_template import ChatTemplate, Message
from offload_engine.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "Message", "StreamDecoder", "Tokenizer", "load_tokenizer"]
