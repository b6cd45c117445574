// Every op of the torch library `vllm_tailorkv`, once for all devices. Contracts stand in
// `kernels/ops.py`; a list of tensors is what `kernels/types.py` flattens to.
#pragma once

namespace tailorkv {

inline constexpr const char* kSchemas[] = {
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, Tensor(c!)? key_rows=None) -> ()",
    "quantize_groups(Tensor groups, Tensor key_cache, Tensor value_cache, Tensor(a!)[] derived, "
    "bool fit=True) -> ()",
    "quantized_decode_attention(Tensor(a!) output, Tensor query, Tensor key_cache, "
    "Tensor value_cache, Tensor[] codes, Tensor block_table, Tensor seq_lens, "
    "Tensor tail_start, float scale, float softcap, Tensor? sink_logits=None) -> ()",
    "log_mass(Tensor(a!) mass, Tensor query, Tensor key_cache, Tensor block_table, "
    "Tensor seq_lens, Tensor tail_start, int sink_tokens, float scale, float softcap, "
    "Tensor? sink_logits=None) -> ()",
    "score_tokens(Tensor(a!) scores, Tensor query, Tensor[] index, Tensor key_cache, "
    "Tensor block_table, Tensor tail_start, Tensor offset, int sink_tokens, "
    "int critical_channels) -> ()",
    "select_topk(Tensor(a!) indices, Tensor scores, Tensor tail_start, int sink_tokens) -> ()",
    "propose_topk(Tensor(a!) indices, Tensor query, Tensor[] index, Tensor key_cache, "
    "Tensor block_table, Tensor tail_start, Tensor offset, int sink_tokens, "
    "int critical_channels, int max_tail_start) -> ()",
    "rerank_topk(Tensor(a!) indices, Tensor candidates, Tensor query, Tensor key_cache, "
    "Tensor block_table, Tensor mass, int channels, float scale, float softcap) -> ()",
    "retrieve_topk(Tensor(a!) indices, Tensor query, Tensor[] index, Tensor key_cache, "
    "Tensor gathered_key, Tensor block_table, Tensor seq_lens, Tensor tail_start, "
    "int sink_tokens, int critical_channels, int candidates, int channels, bool every_head, "
    "float scale, float softcap, int max_tail_start, Tensor? sink_logits=None) -> ()",
    "sparse_decode_attention(Tensor(a!) output, Tensor query, Tensor key_cache, "
    "Tensor value_cache, Tensor indices, Tensor block_table, Tensor seq_lens, "
    "Tensor tail_start, int sink_tokens, float scale, float softcap, "
    "Tensor? sink_logits=None) -> ()",
    "stage_rows(Tensor(a!) key_rows, Tensor(b!) value_rows, Tensor key_cache, Tensor value_cache, "
    "Tensor block_table, Tensor context_start, int first_token, int max_tokens) -> ()",
    "retrieve_attention(Tensor(a!) output, Tensor query, Tensor[] index, Tensor key_cache, "
    "Tensor gathered_key, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor tail_start, int sink_tokens, int critical_channels, int topk, int candidates, "
    "int channels, bool every_head, float scale, float softcap, int max_tail_start, "
    "Tensor? sink_logits=None) -> ()",
    "exact_attention(Tensor(a!) output, Tensor query, Tensor key_cache, Tensor value_cache, "
    "Tensor block_table, Tensor query_start, Tensor query_lens, Tensor seq_lens, float scale, "
    "float softcap, Tensor? sink_logits=None) -> ()",
    "dense_preference(Tensor query, Tensor key, float alpha, float scale, float softcap, "
    "Tensor? sink_logits=None) -> Tensor",
    "isa() -> str",
    "set_isa(str name) -> ()",
    "cuda_archs() -> str",
};

}  // namespace tailorkv
