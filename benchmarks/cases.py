"""The table: every case whose answer is checked and whose time is taken."""

from dataclasses import dataclass, replace

LARGE, SMALL = 32_768, 4_096
KV_HEADS = {64: 3, 128: 2}  # by head_dim; few, so that a case takes milliseconds


@dataclass(frozen=True)
class Case:
    """One kernel at one size. ``keys`` and ``queries`` are tokens; fields that a kernel does not have are 0."""

    name: str
    measures: str
    kernel: str  # "attend", "quantize", "merge" or "matvec"
    q_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    keys: int = 0
    queries: int = 1
    k_bits: int = 32
    v_bits: int = 32
    k_axis: str = "channel"
    v_axis: str = "token"
    tile: int = 64
    precision: str = "default"
    causal: bool = False
    rows: int = 0  # of a weight matrix
    columns: int = 0

    @property
    def n_rep(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        unseen = self.queries * (self.queries - 1) // 2 if self.causal else 0
        return self.queries * self.keys - unseen

    @property
    def byte_products(self) -> int:
        """Products of bytes that the integer route makes; a product of 16-bit factors counts as two."""
        if self.kernel != "attend" or self.precision == "f32":
            return 0
        coded = (self.k_bits <= 8) + (self.v_bits <= 8)
        return coded * self.pairs * self.kv_heads * self.n_rep * self.head_dim * 2

    @property
    def shape(self) -> tuple[object, ...]:
        """What the cases have in common whose times are compared with one another."""
        return (
            self.kernel, self.q_heads, self.kv_heads, self.head_dim, self.keys, self.queries, self.causal, self.rows,
            self.columns,
        )  # fmt: skip

    @property
    def stored(self) -> tuple[object, ...]:
        """What the cases have in common that can run on the same data."""
        formats = (self.k_bits, self.v_bits, self.k_axis, self.v_axis, self.tile)
        return (self.kernel, self.kv_heads, self.head_dim, self.keys, self.queries, self.rows, self.columns, *formats)

    @property
    def is_f16(self) -> bool:
        """Whether this is what the others of its shape are compared with."""
        return (self.k_bits, self.v_bits, self.precision) == (16, 16, "default")


def _format(k_bits: int, v_bits: int) -> str:
    return "f16" if k_bits == v_bits == 16 else f"q{k_bits}" if k_bits == v_bits else f"q{k_bits}v{v_bits}"


def _decode(q_heads: int, kv_heads: int, head_dim: int, keys: int, k_bits: int, v_bits: int, **other: object) -> Case:
    name = f"decode-d{head_dim}-h{q_heads}/{kv_heads}-n{keys}-{_format(k_bits, v_bits)}"
    return Case(
        name, "one query on all keys", "attend", q_heads, kv_heads, head_dim, keys, k_bits=k_bits, v_bits=v_bits, **other,
    )  # fmt: skip


def _decode_cases() -> list[Case]:
    cases = [
        _decode(n_rep * KV_HEADS[d], KV_HEADS[d], d, keys, bits, bits)
        for d in (64, 128)
        for keys in (LARGE, SMALL)
        for n_rep in (1, 3, 4, 8)
        for bits in (16, 8, 4, 3, 2)
    ]
    many_heads = [_decode(16, 8, 128, keys, bits, bits) for keys in (LARGE, SMALL) for bits in (16, 8, 4)]
    coded = [case for case in cases if case.keys == LARGE and case.k_bits <= 8]
    coded += [case for case in many_heads if case.k_bits <= 8]
    cases += [*many_heads, *(replace(case, name=f"{case.name}-tile128", tile=128) for case in coded)]
    plain = _decode(9, 3, 64, LARGE, 4, 4)
    cases += [
        _decode(9, 3, 64, LARGE, 8, 4),
        replace(plain, name=f"{plain.name}-tokens", k_axis="token"),
        replace(plain, name=f"{plain.name}-channels", v_axis="channel"),
        replace(plain, name=f"{plain.name}-tile32", tile=32),
        replace(plain, name=f"{plain.name}-f32", precision="f32"),
    ]
    return cases


def _prefill_cases() -> list[Case]:
    whole = Case(
        "prefill-d64-h9/3-n2048-q4", "2,048 queries on as many keys", "attend", 9, 3, 64, 2_048, 2_048, 4, 4,
    )  # fmt: skip
    causal = replace(
        whole, name="prefill-d64-h9/3-n4096-causal-q4", measures="4,096 queries, each on the keys before it",
        keys=4_096, queries=4_096, causal=True,
    )  # fmt: skip
    return [
        replace(whole, name=whole.name.replace("q4", "f16"), k_bits=16, v_bits=16),
        whole,
        replace(whole, name=f"{whole.name}-f32", precision="f32"),
        replace(causal, name=causal.name.replace("q4", "f16"), k_bits=16, v_bits=16),
        causal,
        replace(causal, name=f"{causal.name}-f32", precision="f32"),
    ]


def _other_cases() -> list[Case]:
    cases = [
        Case(
            f"quantize-d{d}-h{KV_HEADS[d]}-q{bits}", "a dense float32 tile into codes", "quantize", 0, KV_HEADS[d], d, 64,
            0, bits, bits,
        )
        for d in (64, 128)
        for bits in (8, 4, 3, 2)
    ]  # fmt: skip
    plain = next(case for case in cases if case.name == "quantize-d64-h3-q4")
    cases.append(replace(plain, name=f"{plain.name}-other-axes", k_axis="token", v_axis="channel"))
    cases += [
        Case(f"merge-d64-h9-t{t}", "two partial attentions into one", "merge", 9, 3, 64, 96, t) for t in (1, 2_048)
    ]
    cases += [
        Case(f"matvec-{rows}x{columns}", "a float32 matrix times one row", "matvec", rows=rows, columns=columns)
        for rows, columns in ((576, 576), (1_536, 576), (576, 1_536), (49_152, 576), (4_096, 4_096))
    ]
    return cases


CASES = _decode_cases() + _prefill_cases() + _other_cases()


@dataclass(frozen=True)
class Contest:
    """Cases of the table that others are measured beside, at the same shape, in the same run."""

    ours: tuple[str, ...]  # names of cases of one shape
    peers: tuple[str, ...]  # names in peers.py
    near: bool = False  # everybody reads the same keys in each call, which may lie in a cache then


_EVERYBODY = ("numpy-f32", "torch-f32", "torch-bf16", "onnxruntime-f32", "onnxruntime-int8", "onnxruntime-int4")
_FORMATS = ("q8", "q8-tile128", "q4", "q4-tile128")
CONTESTS = [
    Contest(tuple(f"decode-d128-h16/8-n{SMALL}-{form}" for form in _FORMATS), _EVERYBODY),
    Contest(tuple(f"decode-d128-h16/8-n{SMALL}-{form}" for form in _FORMATS), _EVERYBODY, near=True),
    Contest(tuple(f"decode-d128-h16/8-n{LARGE}-{form}" for form in _FORMATS), _EVERYBODY),
    Contest((f"decode-d64-h9/3-n{LARGE}-q4",), ("torch-f32",)),
]
