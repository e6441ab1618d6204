"""Every bound that mixkv puts on files, texts and options, in one place. Bytes, tokens or counts, as the name says.

docs/security.md has them as a table, which a test compares with this file.
"""

# Files
MAX_JSON_BYTES = 64 << 20  # config.json, tokenizer.json, an index: the largest seen in the wild is about 20 MB
MAX_SAFETENSORS_HEADER_BYTES = 16 << 20  # 200,000 tensors; the format allows 100 MB, which takes seconds to parse
MAX_SAFETENSORS_DIMS = 8
MAX_SAFETENSORS_ITEMS = 1 << 60  # of one tensor, an empty dimension counted as 1; NumPy can still shape that
MAX_GGUF_METADATA_BYTES = 256 << 20  # everything before the tensor data of a GGUF file
MAX_GGUF_KEYS = 65_536
MAX_GGUF_TENSORS = 1 << 20
MAX_GGUF_NAME_BYTES = 65_535  # of a metadata key (the format's own limit) or a tensor's name
MAX_GGUF_STRING_BYTES = 64 << 20
MAX_GGUF_ARRAY_ITEMS = 1 << 24
MAX_GGUF_DIMS = 4  # of a tensor
MIN_GGUF_ALIGNMENT = 8
MAX_GGUF_ALIGNMENT = 1 << 16
MAX_REPO_FILES = 100_000  # of a repository of the hub
MAX_SESSION_HEADER_BYTES = 64 << 20  # of a session file: a name for each of its tensors

# Model dimensions: far above any published model, far below what would make an allocation absurd
MAX_LAYERS = 4_096
MAX_HIDDEN_SIZE = 1 << 20
MAX_INTERMEDIATE_SIZE = 1 << 22
MAX_VOCAB_SIZE = 1 << 24
MAX_HEADS = 4_096
MAX_HEADS_PER_KV_HEAD = 128  # what the kernels have room for (kernels/tables.py MAX_N_REP)
MAX_EXPERTS = 4_096  # of a layer
MAX_EXPERTS_IN_ALL = 1 << 15  # of all layers; the largest published model has some 23,000
MAX_HEAD_DIM = 256
MAX_CONTEXT = 1 << 24

# Numbers of a model, which are no less than 1 divided by their limit: float32 can go on with all of them
MAX_ROPE_THETA = 10**15
MAX_ROPE_FACTOR = 10_000  # by which a context was stretched, or one channel pair of it
MAX_MULTIPLIER = 10**6  # of embeddings, residuals, logits, queries, cosines; soft-caps
MAX_NORM_EPS = 10**15

# Text
MAX_PROMPT_BYTES = 16 << 20  # a prompt is refused beyond this before it is tokenized
MAX_TOKENIZER_STEPS = 64  # of a tokenizer.json, before a text is cut into tokens
MAX_TOKENIZER_GROWTH = 256  # times that these may make a text longer
MAX_TEMPLATE_BYTES = 256 << 10  # the longest published chat templates have about 30 kB
MAX_TEMPLATE_NODES = 20_000  # names, operators, tags: compiling takes a second for so many
MAX_TEMPLATE_DEPTH = 100  # of lists in lists; Python's own recursion over deeper ones is not always guarded
MAX_TEMPLATE_INT_BITS = 4_096
MAX_TEMPLATE_INDENT = 16  # spaces, of JSON
MAX_TEMPLATE_STEPS = 100_000  # loop iterations of one rendering, and macro calls, each of which is four
MAX_CHAT_DEPTH = 64  # of lists and mappings in each other, in a message, a tool or a variable
MAX_CHAT_INTEGER = 1 << 63  # in them
MAX_TEMPLATE_WORK = 32 << 20  # characters that one rendering may read or make, beyond a multiple of the conversation

# Cache policies
MAX_POLICY_CHARS = 4_096  # of the one-line form; that of a policy with every field set, and no overrides, has under 250
MAX_POLICY_BYTES = 1 << 20  # of a TOML file
MAX_POLICY_DOTS = 100  # in one of its lines; the time that tomllib takes grows with the square of a dotted key
MAX_WINDOW = 1 << 24
MAX_SINKS = 1 << 16
MAX_ROLLBACK = 1 << 24
MAX_TIERS = 4
MAX_OVERRIDES = 32
MAX_LAYER_ITEMS = 32  # of one override

# Generation
MAX_TOKENS = 1 << 24  # also of a test of speed, or of a needle's text
MAX_STOPS = 16
MAX_TOP_K = 1 << 31
MAX_SEED = (1 << 64) - 1

# Experiments
MAX_VALUES = 1_000  # numbers of one option
MAX_REPETITIONS = 10_000
MAX_TRIALS = 10_000  # of a needle, for each length and depth
MAX_THREADS = 1 << 16  # no machine has more; how many this one has is looked up elsewhere
MAX_CONTINUATION = 1 << 16  # tokens
MAX_SWEEP_SEED = (1 << 31) - 1
MAX_TINY_SEED = (1 << 32) - 1  # of the weights of a tiny model
MAX_CELLS = 100_000  # of a sweep
MAX_RESULT_LINE_BYTES = 64 << 20  # of a results file: a row has some 30 kB, and in shadow mode more
MAX_RESULT_ROWS = 20_000  # of all files of a report together
MAX_RESULT_BINS = 10_000  # of a histogram in a row

# Golden files
MAX_GOLDEN_BYTES = 64 << 20  # some 300,000 tokens and what was beside them
MAX_GOLDEN_PROMPTS = 1_024
MAX_GOLDEN_STEPS = 1 << 16  # tokens generated behind one prompt
MAX_GOLDEN_ALTERNATIVES = 64  # of one step
MAX_GOLDEN_TENSORS = 1 << 17
MAX_GOLDEN_DEPTH = 8  # of a config's objects and lists
MAX_GOLDEN_FACTS = 1_024  # values of a config, versions
MAX_GOLDEN_FACT_CHARS = 4_096  # of one name or text
