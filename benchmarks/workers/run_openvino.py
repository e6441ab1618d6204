"""OpenVINO GenAI as `engines.py` runs it: its LLMPipeline on the CPU, which reads the GGUF file itself.

The scheduler has the values that LLMPipeline takes by itself (a prompt is one pass), but no prefix cache, or a prompt that
begins like an earlier one would not be read. Times are its own metrics: time to the first token, and those between tokens.
A cache is called f16, u8, u4 or f32.

LLMPipeline gives no logits. "quality" compiles the same model, as LLMPipeline saves it, with OpenVINO itself; there the
cache is that of its stateful attention instead of the paged one.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import quality
from common import SHOWN, Job, Row, serve, warm_ids

UNLIMITED = 2**63 - 1


def version() -> dict[str, Any]:
    """Who is here."""
    import openvino_genai

    return {"name": "openvino-genai", "version": openvino_genai.__version__}


def open_pipeline(job: Job) -> Any:
    """The pipeline."""
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = UNLIMITED
    properties = {"INFERENCE_NUM_THREADS": job.threads, "KV_CACHE_PRECISION": job.kv}
    return genai.LLMPipeline(job.model, "CPU", scheduler_config=scheduler, ATTENTION_BACKEND="PA", **properties)


def open_graph(job: Job) -> Any:
    """A function that reads tokens behind those before and gives the logits of all of them, (T, V) float32."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        file.symlink_to(Path(job.model).absolute())
        genai.LLMPipeline(file, "CPU", enable_save_ov_model=True)  # saves it next to the file
        graph = openvino.Core().read_model(file.with_name("openvino_model.xml"))
        properties = {"INFERENCE_NUM_THREADS": job.threads, "KV_CACHE_PRECISION": job.kv}
        request = openvino.compile_model(graph, "CPU", properties).create_infer_request()
    position = 0

    def logits_of(ids: list[int]) -> Any:
        nonlocal position
        begun, position = position, position + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, position), np.int64),
            "position_ids": np.arange(begun, position, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return request.infer(inputs)["logits"][0]

    return logits_of


def run(job: Job) -> Row:
    """Do a job."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    begun = time.perf_counter()
    compute = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    row = Row(details={"compute": compute})
    if job.kind == "quality":
        row.quality = quality.compare(job.folder, job.ids, open_graph(job))
        return row
    pipeline = open_pipeline(job)
    row.load_seconds = time.perf_counter() - begun

    def answer(ids: list[int], tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = tokens, True
        config.do_sample, config.apply_chat_template = False, False
        return pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), config)

    answer(warm_ids(job), 3)
    # The first token comes with the prompt, and the first step is not timed: see ``common.decode``.
    result = answer(job.ids, job.tokens + 2 if job.kind == "decode" else 1)
    metrics = result.perf_metrics
    if metrics.get_num_input_tokens() != len(job.ids):
        raise SystemExit(f"{metrics.get_num_input_tokens()} tokens were read, not {len(job.ids)}")
    row.seconds, row.tokens = metrics.get_ttft().mean / 1e3, len(job.ids)
    row.ids = [int(token) for token in result.tokens[0][:SHOWN]]
    if job.kind == "decode":
        row.read_seconds = row.seconds
        row.step_seconds = [us / 1e6 for us in metrics.raw_metrics.m_durations[1:]]
        row.seconds, row.tokens = sum(row.step_seconds), len(row.step_seconds)
        if row.tokens != job.tokens:
            raise SystemExit(f"{row.tokens} steps were timed, not {job.tokens}")
    return row


if __name__ == "__main__":
    serve("openvino_genai", version, run)
