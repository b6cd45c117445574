#include "support.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

namespace tailorkv {

namespace {

constexpr size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

#if defined(__SANITIZE_ADDRESS__)
// Each piece is memory of its own: AddressSanitizer would see no access beside one in a chunk.
class Scratch {
 public:
  void reset() { pieces_.clear(); }

  void* take(size_t bytes) {
    pieces_.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment})));
    return pieces_.back().get();
  }

 private:
  std::vector<std::unique_ptr<char, AlignedDelete>> pieces_;
};
#else
constexpr size_t kFirstChunk = size_t{1} << 20;

// A stack of chunks, so that pieces never move; `reset` replaces them by one that fits them all.
class Scratch {
 public:
  void reset() {
    if (chunks_.size() > 1) {
      chunks_.clear();
      add_chunk(total_);
    }
    used_ = 0;
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (chunks_.empty() || used_ + bytes > size_) {
      total_ = chunks_.empty() ? 0 : total_;
      add_chunk(std::max(bytes, std::max(kFirstChunk, size_)));
      total_ += size_;
    }
    void* piece = chunks_.back().get() + used_;
    used_ += bytes;
    return piece;
  }

 private:
  void add_chunk(size_t bytes) {
    chunks_.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment})));
    size_ = bytes;
    used_ = 0;
  }

  std::vector<std::unique_ptr<char, AlignedDelete>> chunks_;
  size_t size_ = 0;   // of the last chunk
  size_t used_ = 0;   // of the last chunk
  size_t total_ = 0;  // of all chunks
};
#endif

thread_local Scratch scratch;

}  // namespace

void scratch_reset() { scratch.reset(); }

void* scratch_take(size_t bytes) { return scratch.take(bytes); }

double sum_of_largest(float* values, int64_t n, int64_t k) {
  if (k > 0 && k < n) std::nth_element(values, values + k - 1, values + n, std::greater<>());
  return std::accumulate(values, values + k, 0.0);
}

}  // namespace tailorkv
