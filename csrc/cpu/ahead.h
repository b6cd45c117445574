// Asking for memory ahead of its use, a few cache lines at a time: a core tracks few misses (24 on
// Zen 4), and what is asked beyond them holds up everything behind it.
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

// Cache lines of a few arrays that will be read soon.
class Ahead {
 public:
  template <class T>
  void add(const T* data, int64_t count) {
    const auto* bytes = reinterpret_cast<const char*>(data);
    runs_[runs_end_++] = {bytes, bytes + count * static_cast<int64_t>(sizeof(T))};
    left_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kLine);
  }

  // Ask for one of `stages` equal parts of what is left.
  void ask(int64_t stages) {
    for (int64_t n = ceil_div(left_, stages); n > 0; --n, --left_) {
      Run& run = runs_[runs_begin_];
      __builtin_prefetch(run.next);
      run.next += kLine;
      if (run.next >= run.end) ++runs_begin_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Run {
    const char *next, *end;
  };
  Run runs_[6];
  int runs_begin_ = 0, runs_end_ = 0;
  int64_t left_ = 0;
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
