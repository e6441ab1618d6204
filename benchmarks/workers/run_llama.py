"""llama.cpp as `engines.py` runs it: llama-cpp-python's bindings of the C interface, not its class ``Llama``.

So nothing but ``llama_decode`` on a batch, and an argmax in NumPy over the one row of logits that is asked for, is timed.
Flash attention is on; n_batch and n_ubatch are 512. A cache is called as ggml calls the type, K/V apart as "q8_0/q4_0".
"""

import time
from pathlib import Path
from typing import Any

import quality
from common import Job, Row, decode, serve, warm_ids

BATCH = 512


def version() -> dict[str, Any]:
    """Who is here, and what it was compiled for."""
    import llama_cpp

    about = llama_cpp.llama_print_system_info().decode()
    return {"name": "llama-cpp-python", "version": llama_cpp.__version__, "about": about.strip(" |")}


class Engine:
    """A model, and one sequence of it."""

    def __init__(self, job: Job, room: int, outputs: int) -> None:
        import llama_cpp
        import numpy as np

        self.lib, self.np = llama_cpp, np
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(job.model.encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {job.model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context = self._open_context(job, room, outputs)
        self.position = 0
        batch = self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        for i in range(BATCH):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        shape = (BATCH,)
        self.tokens, self.positions, self.wanted = (
            np.ctypeslib.as_array(pointer, shape) for pointer in (batch.token, batch.pos, batch.logits)
        )

    def _open_context(self, job: Job, room: int, outputs: int) -> Any:
        lib = self.lib
        k, _, v = job.kv.partition("/")
        options = lib.llama_context_default_params()
        options.n_ctx = -(-room // 256) * 256
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = job.threads
        options.n_outputs_max = options.n_outputs_max_per_seq = outputs
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.type_k, options.type_v = (getattr(lib, f"GGML_TYPE_{kind.upper()}") for kind in (k, v or k))
        context = lib.llama_init_from_model(self.model, options)
        if not context:
            raise SystemExit(f"llama.cpp makes no context with a cache of {job.kv}")
        return context

    def forget(self) -> None:
        """Begin a new sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.position = 0

    def pass_(self, ids: list[int], *, first_wanted: int) -> None:
        """At most BATCH tokens; logits from row ``first_wanted`` on."""
        n = self.batch.n_tokens = len(ids)
        self.tokens[:n] = ids
        self.positions[:n] = self.np.arange(self.position, self.position + n)
        self.wanted[:first_wanted], self.wanted[first_wanted:n] = 0, 1
        if code := self.lib.llama_decode(self.context, self.batch):
            raise SystemExit(f"llama_decode returned {code} at position {self.position}")
        self.position += n

    def row(self, i: int) -> Any:
        """The logits of a row of the last pass, (V,) float32; the next pass overwrites them."""
        return self.np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab,))

    def read(self, ids: list[int]) -> int:
        """Read tokens; the most likely next one."""
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            last = first + len(part) == len(ids)
            self.pass_(part, first_wanted=len(part) - last)
        return int(self.row(len(part) - 1).argmax())

    def step(self, token: int) -> int:
        """Decode one token."""
        self.pass_([token], first_wanted=0)
        return int(self.row(0).argmax())

    def all_logits(self, ids: list[int]) -> Any:
        """Logits of every token, (T, V) float32."""
        self.pass_(ids, first_wanted=0)
        return self.np.stack([self.row(i) for i in range(len(ids))])

    def recall(self, path: str, ids: list[int]) -> bool:
        """Whether the cache of these tokens could be had from a file."""
        if not path or not Path(path).exists():
            return False
        import ctypes

        known, count = (ctypes.c_int32 * len(ids))(), ctypes.c_size_t()
        if not self.lib.llama_state_seq_load_file(self.context, path.encode(), 0, known, len(ids), ctypes.byref(count)):
            raise SystemExit(f"llama.cpp does not take back its state {path}")
        if list(known[: count.value]) != ids:
            raise SystemExit(f"{path} is the state of other tokens")
        self.position = len(ids)
        return True

    def remember(self, path: str, ids: list[int]) -> None:
        """Write the cache of the tokens read so far, ``ids``, to a file."""
        import ctypes

        known = (ctypes.c_int32 * len(ids))(*ids)
        if path and not self.lib.llama_state_seq_save_file(self.context, path.encode(), 0, known, len(ids)):
            raise SystemExit(f"llama.cpp cannot write its state to {path}")


def run(job: Job) -> Row:
    """Do a job."""
    begun = time.perf_counter()
    asks_all = job.kind == "quality"
    engine = Engine(job, len(job.ids) + job.tokens + 2, quality.ROWS if asks_all else 1)
    row = Row(load_seconds=time.perf_counter() - begun, details={"flash_attention": True, "n_batch": BATCH})
    if asks_all:
        row.quality = quality.compare(job.folder, job.ids, engine.all_logits)
        return row
    engine.step(engine.read(warm_ids(job)))
    engine.forget()
    begun = time.perf_counter()
    if job.kind == "prefill":
        last = engine.read(job.ids)
        row.seconds, row.tokens, row.ids = time.perf_counter() - begun, len(job.ids), [last]
        return row
    *before, final = job.ids
    if before and not engine.recall(job.state, before):
        engine.read(before)
        row.read_seconds = time.perf_counter() - begun
        engine.remember(job.state, before)
    decode(engine.step, engine.step(final), row, job.tokens)
    return row


if __name__ == "__main__":
    serve("llama_cpp", version, run)
