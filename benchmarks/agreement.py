"""Greedy tokens of mixkv beside those of llama.cpp or transformers, which each may live in an environment of its own.

    LLAMA/bin/python benchmarks/agreement.py record llama.cpp FILE.gguf llama.json       # needs llama-cpp-python
    BLAS/bin/python benchmarks/agreement.py record llama.cpp-whole FILE.gguf blas.json   # compiled with a BLAS
    LLAMA/bin/python benchmarks/agreement.py widen FILE.gguf WIDE.gguf                   # needs gguf
    LLAMA/bin/python benchmarks/agreement.py record llama.cpp WIDE.gguf wide.json
    mixkv convert MODEL FOLDER
    TORCH/bin/python benchmarks/agreement.py record transformers FOLDER exact.json llama.json   # the ids of that file
    python benchmarks/agreement.py compare MODEL llama.json exact.json blas.json
    python benchmarks/agreement.py compare WIDE.gguf wide.json
    python benchmarks/agreement.py compare MODEL --like-llama.cpp llama.json

``record`` writes for each prompt the ids, 40 greedy tokens, and at each step the gap between the two largest logits.
``compare`` feeds mixkv what the other generated, and says how often both choose the same, and where they first do not: both
tokens, the gap there as each of them has it. Weights and cache are float32; or, like llama.cpp's, weights are the file's
codes where the kernels know them, activations are rounded to 8 bits, and the cache is float16.

llama.cpp rounds activations to 8 bits before it multiplies them with codes, so its tokens are not always those of the
file's weights. There are two ways around that, both with its cache in float32. Compiled with a BLAS
(``CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" pip install --no-binary llama-cpp-python llama-cpp-python``) it
makes weights float32 for products with 32 rows or more: ``record llama.cpp-whole`` puts a preface before each prompt, and
reads it with what was generated at once, again and again until each token is the best one behind those before it. And
``widen`` writes the same model with every tensor in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = (
    "The capital of France is", "Once upon a time, there was a little girl who", "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are:\n1.", "To make a good cup of tea, first",
)  # fmt: skip
# More than 32 tokens that each prompt follows in ``llama.cpp-whole``
PREFACE = (
    "The lighthouse stood at the end of a long pier. Every evening the keeper climbed its hundred and twelve steps, lit "
    "the lamp, and wrote the weather of the day into a thick book.\n\n"
)
TOKENS = 40


def best_two(logits: np.ndarray) -> tuple[int, float]:
    """The largest logit's id, and by how much it leads."""
    second, first = np.partition(logits, -2)[-2:]
    return int(logits.argmax()), float(first - second)


def record_llama(path: str, whole: bool) -> list[dict[str, Any]]:
    """What llama.cpp generates from a GGUF file; ``whole``: behind a preface, read at once until nothing changes."""
    import llama_cpp

    cache = {"type_k": 0, "type_v": 0}  # ggml's float32
    model = llama_cpp.Llama(path, n_ctx=512, logits_all=True, verbose=False, n_threads=2, **cache)
    found = []
    for prompt in PROMPTS:
        prompt = (PREFACE if whole else "") + prompt
        ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
        model.reset()
        model.eval(ids)
        steps = []
        for _ in range(TOKENS):
            steps.append(best_two(np.array(model.scores[model.n_tokens - 1])))
            model.eval([steps[-1][0]])
        before: list[int] = [] if whole else [token for token, _ in steps]
        while before != [token for token, _ in steps]:
            before = [token for token, _ in steps]
            model.reset()
            model.eval([*ids, *before[:-1]])
            steps = [best_two(np.array(row)) for row in model.scores[len(ids) - 1 : model.n_tokens]]
        found.append(recorded(prompt, ids, steps))
    return found


def recorded(prompt: str, ids: list[int], steps: list[tuple[int, float]]) -> dict[str, Any]:
    """A prompt as the files have it."""
    tokens, gaps = zip(*steps, strict=True)
    return {"prompt": prompt, "ids": ids, "tokens": list(tokens), "gaps": [round(gap, 4) for gap in gaps]}


def widen(path: str, out: str) -> None:
    """The same GGUF file with all tensors in float32."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def record_transformers(path: str, others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What transformers generates in float32 from a folder, from the ids of another record."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = []
    for prompt in others:
        ids, steps = torch.tensor([prompt["ids"]]), []
        for _ in range(TOKENS):
            with torch.inference_mode():
                steps.append(best_two(model(ids).logits[0, -1].numpy()))
            ids = torch.cat([ids, torch.tensor([[steps[-1][0]]])], dim=1)
        found.append(recorded(prompt["prompt"], prompt["ids"], steps))
    return found


def compare(name: str, files: list[str], weights: str = "f32", policy: str = "full") -> None:
    """Hold mixkv against each record."""
    import mixkv
    from mixkv import CachePolicy, Session

    model = mixkv.load(name, weights)
    for file in files:
        print(f"{file}: weights {weights}, cache {policy}")
        for other in json.loads(Path(file).read_text()):
            prompt = other["prompt"]
            if model.encode(prompt) != other["ids"]:
                raise SystemExit(f"{prompt!r} has other ids: {model.encode(prompt)} and {other['ids']}")
            session = Session(model, CachePolicy.parse(policy))
            logits, same, first = session.forward(other["ids"], "last"), 0, "never"
            for i, (token, gap) in enumerate(zip(other["tokens"], other["gaps"], strict=True)):
                mine, lead = int(logits.argmax()), float(logits.max() - logits[token])
                if mine == token:
                    same += 1
                elif first == "never":
                    first = f"at {i}: {model.tokenizer.decode([mine])!r}, there {model.tokenizer.decode([token])!r}, "
                    first += f"gaps {lead:.3f} and {gap:.3f}"
                logits = session.forward([token], "last")
            print(f"  {prompt.removeprefix(PREFACE)[:24]!r:28} {same} of {TOKENS} the same, first apart {first}")


def main() -> None:
    """See the module's own words."""
    match sys.argv[1:]:
        case ["widen", path, out]:
            widen(path, out)
            return
        case ["record", "llama.cpp" | "llama.cpp-whole" as how, path, out]:
            found = record_llama(path, how == "llama.cpp-whole")
        case ["record", "transformers", path, out, other]:
            found = record_transformers(path, json.loads(Path(other).read_text()))
        case ["compare", name, "--like-llama.cpp", *files] if files:
            compare(name, files, "auto", "f16")
            return
        case ["compare", name, *files] if files:
            compare(name, files)
            return
        case _:
            raise SystemExit(__doc__)
    Path(out).write_text("[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n")


if __name__ == "__main__":
    main()
