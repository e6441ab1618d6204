"""Other libraries at the same shape, on the same keys, in the same run. Each may be missing.

Everything is one decode step of one layer: one query on all keys, in as many copies of the keys as it takes to come from
memory, or, in a near contest, in one. Nobody repeats K and V for the heads that share them. torch is imported before
anything of ours, which would tell its OpenMP threads how long to spin.
"""

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torch, onnxruntime, onnx = _optional("torch"), _optional("onnxruntime"), _optional("onnx")

import numpy as np  # noqa: E402
from cases import CASES, Case, Contest  # noqa: E402
from check import quantize_as  # noqa: E402
from machine import CALM, COLD_BYTES  # noqa: E402
from timing import attention_call, copy_segment, keys_nbytes  # noqa: E402

from mixkv.kernels.reference import reference_attention  # noqa: E402

ROUNDS, CALLS = 7, 4  # turns of each, and timed calls in a turn
WARM = 0.02  # seconds of calls that do not count: cores that have slept take a while to come back to their pace


@dataclass(frozen=True)
class Contender:
    """Somebody who can do one decode step. ``run`` does it on the copy whose turn it is, ``read`` gives float32 (H, D)."""

    name: str
    nbytes: int  # of K and V that a step reads
    run: Callable[[], Any]
    read: Callable[[Any], Any]


def versions() -> str:
    """Who is here."""
    found = {"numpy": np, "torch": torch, "onnxruntime": onnxruntime, "onnx": onnx}
    return ", ".join(f"{name} {module.__version__ if module else 'not installed'}" for name, module in found.items())


def _copies(make: Callable[[], Any], nbytes: int, near: bool) -> Iterable[Any]:
    return itertools.cycle([make() for _ in range(1 if near else max(2, math.ceil(COLD_BYTES / nbytes)))])


def _ours(case: Case, q: Any, k: Any, v: Any, near: bool) -> Contender:
    segment = quantize_as(case, k, v)
    nbytes = keys_nbytes(case)
    copies, call = _copies(lambda: copy_segment(case, segment), nbytes, near), attention_call(case, q)
    return Contender(f"mixkv {case.name}", nbytes, lambda: call(next(copies)), lambda out: out[0])


def _numpy(q: Any, k: Any, v: Any, near: bool) -> Contender:
    """Two einsums, whose products ``optimize`` hands to BLAS; the keys are float32 before the clock starts."""
    n, heads, d = k.shape
    rows = (q[0] * d**-0.5).reshape(heads, -1, d)
    nbytes = k.nbytes + v.nbytes
    copies = _copies(lambda: [np.ascontiguousarray(x.swapaxes(0, 1)) for x in (k, v)], nbytes, near)

    def run() -> Any:
        keys, values = next(copies)
        weights = np.einsum("grd,gnd->grn", rows, keys, optimize=True)
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        total = weights.sum(axis=-1, keepdims=True)
        return np.einsum("grn,gnd->grd", weights, values, optimize=True) / total

    return Contender("numpy float32, einsum", nbytes, run, lambda out: out.reshape(-1, d))


def _torch(q: Any, k: Any, v: Any, near: bool, dtype: Any, threads: int) -> Contender:
    torch.set_num_threads(threads)
    query = torch.from_numpy(q).swapaxes(0, 1)[None].to(dtype)  # 1, H, T, D
    own = [torch.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1)))[None].to(dtype) for x in (k, v)]
    nbytes = sum(x.numel() * x.element_size() for x in own)
    copies = _copies(lambda: [x.clone() for x in own], nbytes, near)

    def run() -> Any:
        with torch.inference_mode():
            keys, values = next(copies)
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return Contender(f"torch {dtype}".replace("torch.", ""), nbytes, run, lambda out: out[0, :, 0].float().numpy())


# --- onnxruntime: com.microsoft GroupQueryAttention, a graph of one node -----------------------------------------------


def _codes(x: Any, bits: int) -> tuple[Any, Any]:
    """Codes with a sign of x (1, Hkv, N, D) and their scales (1, Hkv, 1, D), one a channel; two codes of 4 bits a byte."""
    largest = 2 ** (bits - 1) - 1
    scales = np.abs(x).max(axis=2, keepdims=True) / largest
    codes = np.rint(x / scales).astype(np.int8)
    if bits == 4:
        biased = (codes + 8).astype(np.uint8)
        codes = biased[..., 0::2] | biased[..., 1::2] << 4
    return codes, scales.astype(np.float32)


def _graph(q_heads: int, kv_heads: int, d: int, bits: int) -> bytes:
    """The model: the new token's q, k, v and the cache so far, which the node extends in place."""
    helper, types = onnx.helper, onnx.TensorProto
    stored = {32: types.FLOAT, 8: types.INT8, 4: types.UINT8}[bits]
    width = d // 2 if bits == 4 else d
    inputs = {
        "query": (types.FLOAT, [1, 1, q_heads * d]), "key": (types.FLOAT, [1, 1, kv_heads * d]),
        "value": (types.FLOAT, [1, 1, kv_heads * d]), "past_k": (stored, [1, kv_heads, "room", width]),
        "past_v": (stored, [1, kv_heads, "room", width]), "last": (types.INT32, [1]), "total": (types.INT32, [1]),
    }  # fmt: skip
    names, attributes = list(inputs), {"num_heads": q_heads, "kv_num_heads": kv_heads}
    if bits != 32:
        inputs |= {f"{side}_scale": (types.FLOAT, [1, kv_heads, 1, d]) for side in "kv"}
        names += [""] * 5 + ["k_scale", "v_scale"]  # optional inputs that are not given have no name
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    outputs = {"out": inputs["query"], "now_k": (stored, [1, kv_heads, "room2", width])}
    outputs["now_v"] = outputs["now_k"]
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain="com.microsoft", **attributes)
    infos = [
        [helper.make_tensor_value_info(name, *kind) for name, kind in group.items()] for group in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "decode", *infos), opset_imports=opsets)
    model.ir_version = 10
    return model.SerializeToString()


def _onnxruntime(q: Any, k: Any, v: Any, near: bool, bits: int, threads: int) -> Contender:
    n, heads, d = k.shape
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    graph = _graph(q.shape[1], heads, d, bits)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    whole = [np.ascontiguousarray(x.swapaxes(0, 1))[None] for x in (k, v)]
    small = {"query": q.reshape(1, 1, -1), "key": k[-1].reshape(1, 1, -1), "value": v[-1].reshape(1, 1, -1)}
    small |= {"last": np.array([n - 1], np.int32), "total": np.array([n], np.int32)}
    if bits != 32:
        (k_codes, small["k_scale"]), (v_codes, small["v_scale"]) = (_codes(x, bits) for x in whole)
        whole = [k_codes, v_codes]
    nbytes = sum(x.nbytes for x in whole)

    def make() -> Any:
        binding = session.io_binding()
        for name, x in small.items():
            binding.bind_cpu_input(name, x)
        for side, x in zip("kv", whole, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(x.copy())
            binding.bind_ortvalue_input(f"past_{side}", value)
            binding.bind_ortvalue_output(f"now_{side}", value)  # the same memory: the new token is put in its place
        binding.bind_output("out")
        return binding

    copies = _copies(make, nbytes, near)

    def run() -> Any:
        binding = next(copies)
        session.run_with_iobinding(binding)
        return binding

    name = "float32" if bits == 32 else f"int{bits}"
    return Contender(
        f"onnxruntime GroupQueryAttention {name}", nbytes, run, lambda b: b.get_outputs()[-1].numpy().reshape(-1, d)
    )


def _contenders(contest: Contest, q: Any, k: Any, v: Any, threads: int) -> tuple[list[Contender], list[str]]:
    """Who takes part, ours first, and who would if it were installed."""
    by_name = {case.name: case for case in CASES}
    common = q, k, v, contest.near
    found, missing = [_ours(by_name[name], *common) for name in contest.ours], []
    for name in contest.peers:
        library, kind = name.split("-")
        if library == "numpy":
            found.append(_numpy(*common))
        elif library == "torch" and torch:
            found.append(_torch(*common, {"f32": torch.float32, "bf16": torch.bfloat16}[kind], threads))
        elif library == "onnxruntime" and onnxruntime and onnx:
            found.append(_onnxruntime(*common, {"f32": 32, "int8": 8, "int4": 4}[kind], threads))
        else:
            missing.append(name)
    return found, missing


def run(contest: Contest, threads: int) -> dict[str, Any]:
    """Everybody takes turns; before each turn all threads go to sleep, and its first calls do not count (WARM)."""
    case = next(case for case in CASES if case.name == contest.ours[0])
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((n, heads, case.head_dim), dtype=np.float32)
        for n, heads in ((1, case.q_heads), (case.keys, case.kv_heads), (case.keys, case.kv_heads))
    )
    want = reference_attention(q, k, v)[0][0]
    contenders, missing = _contenders(contest, q, k, v, threads)
    errors = [float(np.abs(x.read(x.run()) - want).max() / np.abs(want).max()) for x in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS):
        for contender, mine in zip(contenders, times, strict=True):
            time.sleep(CALM)
            until = time.perf_counter() + WARM
            while time.perf_counter() < until:
                contender.run()
            for _ in range(CALLS):
                begun = time.perf_counter()
                contender.run()
                mine.append(time.perf_counter() - begun)
    rows = []
    for contender, mine, error in zip(contenders, times, errors, strict=True):
        ratios = [
            statistics.median(a / b for a, b in zip(mine, times[i], strict=True)) for i in range(len(contest.ours))
        ]
        row = {"name": contender.name, "seconds": statistics.median(mine), "bytes_read": contender.nbytes}
        rows.append({**row, "ratios": ratios, "error": error})
    shape = f"{case.q_heads} query heads, {case.kv_heads} KV heads, head_dim {case.head_dim}, {case.keys} keys, 1 query"
    shape += ", the same keys in each call" if contest.near else ""
    return {"shape": shape, "near": contest.near, "ours": contest.ours, "rows": rows, "missing": missing}


def table(found: dict[str, Any]) -> str:
    """What ``run`` found, to be printed."""
    width = max(len(row["name"]) for row in found["rows"])
    ours = [name.split("-", 4)[-1] for name in found["ours"]]
    columns = ["median us", "MB", "GB/s", *(f"x {name}" for name in ours), "error"]
    lines = ["", f"{found['shape']:{width}}" if len(found["shape"]) <= width else found["shape"]]
    lines.append(" " * width + "".join(f"  {name:>12}" for name in columns))
    for row in found["rows"]:
        rate = row["bytes_read"] / row["seconds"] / 1e9
        cells = [f"{row['seconds'] * 1e6:.0f}", f"{row['bytes_read'] / 1e6:.1f}", f"{rate:.1f}"]
        cells += [*(f"{ratio:.2f}" for ratio in row["ratios"]), f"{row['error']:.1e}"]
        lines.append(f"{row['name']:{width}}" + "".join(f"  {text:>12}" for text in cells))
    return "\n".join(lines + [f"{name}: not installed" for name in found["missing"]])
