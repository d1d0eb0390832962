"""Components for frameworks, each over the public client: LangChain, LlamaIndex, Haystack, LanceDB, PyTerrier, MTEB.

Every module is imported where it is used, and brings its framework: `pip install 'preread[langchain]'` and so on.
preread.integrations.functions needs no framework.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """For the imports of a framework: an ImportError names the extra that installs it."""
    try:
        yield
    except ImportError as exc:
        message = f"preread.integrations.{extra} cannot import its framework ({exc}): pip install 'preread[{extra}]'"
        raise ImportError(message, name=exc.name, path=exc.path) from exc
