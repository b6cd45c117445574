// Asking for memory ahead of its use, a few cache lines at a time: a core tracks few misses (24 on
// Zen 4), and what was asked beyond them at once made asking useless (benchmarks/NOTES.md).
#pragma once

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Cache lines of a few arrays that will be read soon.
class Ahead {
 public:
  // Arrays that follow each other are one run.
  template <class T>
  void add(const T* data, int64_t count) {
    const auto* begin = reinterpret_cast<const char*>(data);
    const auto* end = reinterpret_cast<const char*>(data + count);
    if (count_ == 0 || runs_[count_ - 1].end != begin) runs_[count_++].next = begin;
    runs_[count_ - 1].end = end;
  }

  // Ask for up to n lines.
  void ask(int64_t n) {
    while (current_ < count_) {
      Run& run = runs_[current_];
      for (; n > 0 && run.next < run.end; --n, run.next += kLine) __builtin_prefetch(run.next);
      if (run.next < run.end) return;
      ++current_;
    }
  }

  // Ask for one of n equal parts of what is left.
  void ask_part(int64_t n) {
    int64_t bytes = 0;
    for (int i = current_; i < count_; ++i) bytes += runs_[i].end - runs_[i].next;
    ask(ceil_div(bytes, kLine * n));
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Run {
    const char *next, *end;
  };
  Run runs_[6];
  int current_ = 0, count_ = 0;
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
