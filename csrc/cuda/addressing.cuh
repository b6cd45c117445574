// Where the elements of pages and records lie. All arithmetic on addresses is in 64 bits: a host
// pool holds more than 2^31 elements.
#pragma once

#include "ops.h"
#include "portable.cuh"

namespace tailorkv::cuda {

struct BlockSlot {
  int64_t block;   // entry of the row's block table, or block of the pool
  int32_t offset;  // token or group within the block
};

// Token t of a row stands in entry `block` of its block table.
TAILORKV_HD BlockSlot token_slot(int32_t token, int32_t block_size) {
  return {token / block_size, token % block_size};
}

// A group's number is block * G + group within the block.
TAILORKV_HD BlockSlot group_slot(int64_t item, int32_t groups_per_block) {
  return {item / groups_per_block, static_cast<int32_t>(item % groups_per_block)};
}

TAILORKV_HD int64_t token_bytes(const Pages& pages, int64_t block, int64_t head, int64_t token) {
  return block * pages.block + head * pages.head + token * pages.token;
}

TAILORKV_HD const char* token_address(const Pages& pages, int64_t block, int64_t head,
                                      int64_t token) {
  return static_cast<const char*>(pages.data) + token_bytes(pages, block, head, token);
}

}  // namespace tailorkv::cuda
