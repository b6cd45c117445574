"""The metrics of workers and engine cores by name. docs/METRICS.md lists them."""

from vllm_tailorkv.attention.meters import Metric

DECODE_ROWS = Metric(
    "tailorkv_decode_rows",
    "counter",
    "Steps of requests that the tailored ops served, once for each layer.",
)
EXACT_ROWS = Metric(
    "tailorkv_exact_rows",
    "counter",
    "Query tokens attended in full (prompts, short contexts, drafts), once for each layer.",
)
CONTEXT_TOKENS = Metric(
    "tailorkv_context_tokens",
    "counter",
    "Tokens in the contexts of the decode rows.",
)
SELECTED_TOKENS = Metric(
    "tailorkv_selected_tokens",
    "counter",
    "Tokens that the decode rows of sparse layers retrieved, each KV head as many.",
)
QUANTIZED_GROUPS = Metric(
    "tailorkv_quantized_groups",
    "counter",
    "Groups of tokens whose derived records were written, once for each layer.",
)
HOST_READ = Metric(
    "tailorkv_host_read_bytes",
    "counter",
    "Bytes of full-precision K and V read, over the bus on a GPU: by decode steps, by attention in "
    "full, and to derive records.",
    ("layers", "by"),
)
HOST_WRITTEN = Metric(
    "tailorkv_host_written_bytes",
    "counter",
    "Bytes of full-precision K and V written, over the bus on a GPU.",
)
DERIVED_READ = Metric(
    "tailorkv_derived_read_bytes",
    "counter",
    "Bytes of codes and indexes that decode steps read.",
)
DERIVED_WRITTEN = Metric(
    "tailorkv_derived_written_bytes",
    "counter",
    "Bytes of codes and indexes written.",
)
HOT_ROWS = Metric(
    "tailorkv_hot_rows",
    "counter",
    "Rows of K and V that decode steps were about to read: found on the GPU, or fetched over the "
    "bus. Each KV head and layer counts.",
    ("layers", "were"),
)
CACHE_BLOCKS = Metric(
    "tailorkv_cache_blocks",
    "gauge_sum",
    "Blocks that hold tokens or may, of each tier.",
    ("tier",),
)
CACHE_BLOCKS_USED = Metric(
    "tailorkv_cache_blocks_used",
    "gauge_sum",
    "Blocks of requests, of each tier; what is only kept for a prefix hit is free.",
    ("tier",),
)
GUARD_ERROR = Metric(
    "tailorkv_guard_error",
    "histogram",
    "Norm of the error of a guarded row's output over the norm of the exact output.",
    buckets=(0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)
GUARD_LOST_MASS = Metric(
    "tailorkv_guard_lost_mass",
    "histogram",
    "Share of a guarded row's true attention on tokens that its sparse layer did not read.",
    buckets=(0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)
GUARD_WORST_ERROR = Metric(
    "tailorkv_guard_worst_error",
    "gauge_max",
    "The largest error of a guarded row in each layer since the start.",
    ("layers", "layer"),
)

METRICS = (
    DECODE_ROWS,
    EXACT_ROWS,
    CONTEXT_TOKENS,
    SELECTED_TOKENS,
    QUANTIZED_GROUPS,
    HOST_READ,
    HOST_WRITTEN,
    DERIVED_READ,
    DERIVED_WRITTEN,
    HOT_ROWS,
    CACHE_BLOCKS,
    CACHE_BLOCKS_USED,
    GUARD_ERROR,
    GUARD_LOST_MASS,
    GUARD_WORST_ERROR,
)
