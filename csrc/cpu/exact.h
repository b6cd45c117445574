// exact_attention: online softmax over tiles of the context, for groups of queries side by side.
//
// All is kept transposed: a vector holds one token's scores, or one channel of the output, for the
// queries of a group. So the softmax takes no sums across lanes, and both products are
//
//   out[row][query] (+)= sum over steps of a[row][step] * b[step][query]
//
// once with rows of tokens and steps of channels, once with rows of channels and steps of tokens.
// `Units` is what multiplies; see exact_floats.h, exact_pairs.h and exact_tiles.h.
//
// What a query gets depends on its position and its context alone, to the bit: neither on the
// chunk that it came in nor on threads.
#pragma once

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Queries of a group: one for each lane of the widest vectors.
constexpr int64_t kLanes = 16;
// Groups that are multiplied together.
constexpr int kTogetherGroups = 2;
// Tokens of a tile; the softmax of one is done at once. Blocks hold whole runs.
constexpr int64_t kTileTokens = 128, kRunTokens = 32, kRuns = kTileTokens / kRunTokens;
// Tokens whose softmax starts anew, and is merged with those before at the end: what may be done
// by several threads.
constexpr int64_t kSegmentTokens = 2048;
// Bytes of the outputs of the queries that one thread takes through the context at once: with
// their totals they stay in the second-level cache.
constexpr int64_t kOutputBytes = int64_t{1} << 18;

constexpr float kNone = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;

// 2^x within 2^-23 from 2^-126 on, which stands for less.
inline F power(F x) {
  x = max(x, splat(-126.0f));
  const F n = round_even(x), r = x - n;
  F p = fma(splat(0.00132647271f), r, splat(0.00967151265f));
  p = fma(p, r, splat(0.0555073374f));
  p = fma(p, r, splat(0.240222421f));
  p = fma(p, r, splat(0.693146978f));
  return scale_by_power(fma(p, r, splat(1.0f)), n);
}

// The softmax so far of groups of queries. Scores are in powers of two.
//   highest, total: [groups, kLanes]; values: [groups, rows, kLanes]
struct Softmaxes {
  float *highest, *total, *values;
  int64_t rows;

  static int64_t size(int64_t groups, int64_t rows) { return groups * kLanes * (rows + 2); }

  static Softmaxes in(float* memory, int64_t groups, int64_t rows) {
    return {memory, memory + groups * kLanes, memory + 2 * groups * kLanes, rows};
  }

  float* values_of(int64_t group) const { return values + group * rows * kLanes; }

  void clear(int64_t groups) const {
    for (int64_t i = 0; i < groups * kLanes; ++i) highest[i] = kNone;
    __builtin_memset(total, 0, static_cast<size_t>(groups * kLanes) * sizeof(float));
    __builtin_memset(values, 0, static_cast<size_t>(groups * rows * kLanes) * sizeof(float));
  }

  // Take in what another stretch of the context gave.
  void merge(const Softmaxes& other, int64_t groups) const {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t lane = 0; lane < kLanes; lane += W) {
        const int64_t at = group * kLanes + lane;
        const F before = load(highest + at), after = load(other.highest + at);
        const F now = max(before, after), shown = max(now, splat(-1e30f));
        const F keep = power(before - shown), add = power(after - shown);
        store(highest + at, now);
        store(total + at, load(total + at) * keep + load(other.total + at) * add);
        float *to = values_of(group) + lane, *from = other.values_of(group) + lane;
        for (int64_t row = 0; row < rows; ++row, to += kLanes, from += kLanes) {
          store(to, load(to) * keep + load(from) * add);
        }
      }
    }
  }
};

// Queries of one row and KV head: `count` from `first` on, counted over tokens, and over the query
// heads of each.
struct Lot {
  int32_t row, head;
  int64_t first, count;
};

// Of a tile: `kRuns` stretches of K and V, as `Units` takes them.
template <class Units>
struct TileView {
  using Element = typename Units::Element;
  const Element *key[kRuns], *value[kRuns];
  int64_t key_token, value_row, value_step;
  int64_t first, count;  // tokens
};

// What one thread works with.
//   queries: [groups, steps, kLanes]; limits: [groups, kLanes], the last token each attends to
//   scores: [kTogetherGroups, kTileTokens, kLanes], floats, and weights the same as `Units` has
//   them; key, value: a tile, packed
template <class Units>
struct Desk {
  typename Units::Operand* queries;
  float *limits, *scores;
  typename Units::Operand* weights;
  typename Units::Element *key, *value;
  Softmaxes part, whole;
};

template <class Units>
class Exact {
  using Element = typename Units::Element;
  using Operand = typename Units::Operand;

 public:
  explicit Exact(const ExactAttention& op)
      : op_(op),
        size_(op.shape.head_size),
        channels_(ceil_div(size_, Units::kChannels) * Units::kChannels),
        per_token_(op.query_heads / op.shape.kv_heads),
        factor_(op.softcap > 0 ? kLog2E : op.scale * kLog2E) {}

  template <class T>
  void run() {
    deal();
    if (count_ == 0) return;
    const int threads = num_threads();
    auto* desks = take<Desk<Units>>(threads);
    for (int i = 0; i < threads; ++i) desks[i] = take_desk();
    if (count_ < 2 * threads && most_segments_ > 1) return run_segments<T>(desks);
    parallel_for(count_, [&](int64_t i) {
      const Lot& lot = lots_[i];
      const Desk<Units>& desk = desks[omp_get_thread_num()];
      const int64_t groups = prepare<T>(desk, lot), segments = segments_of(lot);
      if (segments == 1) {
        attend<T>(desk, lot, 0, desk.whole);
      } else {
        desk.whole.clear(groups);
        for (int64_t segment = 0; segment < segments; ++segment) {
          attend<T>(desk, lot, segment, desk.part);
          desk.whole.merge(desk.part, groups);
        }
      }
      finish<T>(lot, desk.whole);
    });
  }

 private:
  // Queries of a lot: as many as their outputs allow, fewer where threads would be idle.
  void deal() {
    const int64_t heads = op_.shape.kv_heads;
    int64_t total = 0;
    for (int32_t row = 0; row < op_.rows; ++row) total += op_.query_lens[row] * per_token_ * heads;
    constexpr int64_t kLeast = kTogetherGroups * kLanes;
    int64_t most = kOutputBytes / static_cast<int64_t>(sizeof(float)) / channels_;
    most = smaller(most, ceil_div(total, 4 * num_threads()));
    lot_queries_ = larger(ceil_div(most, kLeast), 1) * kLeast;
    lots_ = take<Lot>(total / kLeast + op_.rows * heads);
    count_ = 0;
    // The last ones of a prompt read most of it: those first.
    for (int32_t row = 0; row < op_.rows; ++row) {
      const int64_t queries = op_.query_lens[row] * per_token_;
      for (int64_t i = ceil_div(queries, lot_queries_) - 1; i >= 0; --i) {
        const int64_t first = i * lot_queries_;
        for (int32_t head = 0; head < heads; ++head) {
          const Lot lot{row, head, first, smaller(lot_queries_, queries - first)};
          most_segments_ = larger(most_segments_, segments_of(lot));
          lots_[count_++] = lot;
        }
      }
    }
  }

  // The token at which query `i` of a row stands, the last one it attends to.
  int64_t position(int32_t row, int64_t i) const {
    return op_.seq_lens[row] - op_.query_lens[row] + i / per_token_;
  }

  int64_t segments_of(const Lot& lot) const {
    return position(lot.row, lot.first + lot.count - 1) / kSegmentTokens + 1;
  }

  int64_t steps() const { return channels_ / Units::kPair; }

  Softmaxes take_softmaxes(int64_t groups) const {
    return Softmaxes::in(take<float>(Softmaxes::size(groups, channels_)), groups, channels_);
  }

  Desk<Units> take_desk() const {
    const int64_t groups = lot_queries_ / kLanes;
    constexpr int64_t kScores = kTogetherGroups * kTileTokens * kLanes;
    auto* scores = take<float>(kScores);
    return {take<Operand>(groups * steps() * kLanes),
            take<float>(groups * kLanes),
            scores,
            Units::kPair == 1 ? reinterpret_cast<Operand*>(scores)
                              : take<Operand>(kScores / Units::kPair),
            take<Element>(kTileTokens * channels_),
            take<Element>(kTileTokens * channels_),
            take_softmaxes(groups),
            take_softmaxes(groups)};
  }

  // Fewer lots than threads: threads share them by segments, and merge in order.
  template <class T>
  void run_segments(const Desk<Units>* desks) {
    const int64_t groups = lot_queries_ / kLanes, size = Softmaxes::size(groups, channels_);
    auto* tasks = take<int64_t>(count_ * most_segments_);
    int64_t num_tasks = 0;
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t segment = 0; segment < segments_of(lots_[i]); ++segment) {
        tasks[num_tasks++] = i * most_segments_ + segment;
      }
    }
    float* parts = take<float>(count_ * most_segments_ * size);
    const auto part = [&](int64_t at) {
      return Softmaxes::in(parts + at * size, groups, channels_);
    };
    parallel_for(num_tasks, [&](int64_t i) {
      const Lot& lot = lots_[tasks[i] / most_segments_];
      const Desk<Units>& desk = desks[omp_get_thread_num()];
      prepare<T>(desk, lot);
      attend<T>(desk, lot, tasks[i] % most_segments_, part(tasks[i]));
    });
    parallel_for(count_, [&](int64_t i) {
      const Softmaxes whole = part(i * most_segments_);
      for (int64_t segment = 1; segment < segments_of(lots_[i]); ++segment) {
        whole.merge(part(i * most_segments_ + segment), ceil_div(lots_[i].count, kLanes));
      }
      finish<T>(lots_[i], whole);
    });
  }

  // Lay out a lot's queries; how many groups they are. Lanes beyond them repeat the last one.
  template <class T>
  int64_t prepare(const Desk<Units>& desk, const Lot& lot) const {
    const int64_t groups = ceil_div(lot.count, kLanes);
    for (int64_t group = 0; group < groups; ++group) {
      const T* rows[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t i = smaller(group * kLanes + lane, lot.count - 1);
        desk.limits[group * kLanes + lane] = static_cast<float>(position(lot.row, lot.first + i));
        rows[lane] = static_cast<const T*>(op_.query) +
                     place(lot, lot.first + i, op_.query_token, op_.query_head);
      }
      Units::lay_queries(desk.queries + group * steps() * kLanes, rows, size_, steps());
    }
    return groups;
  }

  // Where query `i` of a lot's row lies in an array of [T, H, d].
  int64_t place(const Lot& lot, int64_t i, int64_t token, int64_t head) const {
    return (op_.query_start[lot.row] + i / per_token_) * token +
           (lot.head * per_token_ + i % per_token_) * head;
  }

  // Attend to one segment of the context.
  template <class T>
  void attend(const Desk<Units>& desk, const Lot& lot, int64_t segment,
              const Softmaxes& softmaxes) const {
    const int64_t groups = ceil_div(lot.count, kLanes), begin = segment * kSegmentTokens;
    const int64_t last = position(lot.row, lot.first + lot.count - 1);
    const int64_t end = smaller(last + 1, begin + kSegmentTokens);
    softmaxes.clear(groups);
    Units::begin();
    for (int64_t first = begin; first < end; first += kTileTokens) {
      const TileView<Units> tile =
          view_tile<T>(desk, lot, first, smaller(kTileTokens, end - first), last);
      for (int64_t group = 0; group < groups; group += kTogetherGroups) {
        const int64_t together = smaller(kTogetherGroups, groups - group);
        // Positions rise, and so do the limits of lanes.
        if (static_cast<float>(first) > desk.limits[(group + together) * kLanes - 1]) continue;
        attend_groups(desk, tile, group, static_cast<int>(together), softmaxes);
      }
    }
    Units::end();
  }

  void attend_groups(const Desk<Units>& desk, const TileView<Units>& tile, int64_t group,
                     int together, const Softmaxes& softmaxes) const {
    const Operand *queries[kTogetherGroups], *weights[kTogetherGroups];
    float *scores[kTogetherGroups], *values[kTogetherGroups];
    for (int i = 0; i < together; ++i) {
      queries[i] = desk.queries + (group + i) * steps() * kLanes;
      weights[i] = desk.weights + i * kTileTokens / Units::kPair * kLanes;
      values[i] = softmaxes.values_of(group + i);
    }
    const int64_t runs = ceil_div(tile.count, kRunTokens);
    for (int64_t run = 0; run < runs; ++run) {
      for (int i = 0; i < together; ++i) {
        scores[i] = desk.scores + (i * kTileTokens + run * kRunTokens) * kLanes;
      }
      Units::template multiply<false>(tile.key[run], tile.key_token, 1, kRunTokens, steps(),
                                      queries, together, scores);
    }
    for (int i = 0; i < together; ++i) {
      weigh(desk.scores + i * kTileTokens * kLanes, tile, runs * kRunTokens,
            desk.limits + (group + i) * kLanes, softmaxes, group + i,
            desk.weights + i * kTileTokens / Units::kPair * kLanes);
    }
    if constexpr (Units::kPair > 1) {
      Units::template multiply<true>(tile.value[0], tile.value_row, 1, channels_,
                                     runs * kRunTokens / Units::kPair, weights, together, values);
    } else {
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t tokens = smaller(kRunTokens, tile.count - run * kRunTokens);
        Units::template multiply<true>(tile.value[run], 1, tile.value_step, channels_, tokens,
                                       weights, together, values);
        for (int i = 0; i < together; ++i) weights[i] += kRunTokens * kLanes;
      }
    }
  }

  // From scores to weights; what came before is weighed down where a new maximum appears.
  //   scores: [tokens, kLanes]
  void weigh(float* scores, const TileView<Units>& tile, int64_t tokens, const float* limits,
             const Softmaxes& softmaxes, int64_t group, Operand* weights) const {
    const bool masked = static_cast<float>(tile.first + tokens - 1) > limits[0];
    const F factor = splat(factor_);
    for (int64_t lane = 0; lane < kLanes; lane += W) {
      float* score = scores + lane;
      if (op_.softcap > 0) {
        for (int64_t t = 0; t < tokens; ++t) {
          store(score + t * kLanes, cap(load(score + t * kLanes) * splat(op_.scale), op_.softcap));
        }
      }
      if (masked) {
        const F limit = load(limits + lane);
        for (int64_t t = 0; t < tokens; ++t) {
          const F position = splat(static_cast<float>(tile.first + t));
          const F seen = load(score + t * kLanes);
          store(score + t * kLanes, if_greater(position, limit, splat(kNone), seen));
        }
      }
      F most[4] = {splat(kNone), splat(kNone), splat(kNone), splat(kNone)};
      for (int64_t t = 0; t < tokens; t += 4) {
        for (int i = 0; i < 4; ++i) most[i] = max(most[i], load(score + (t + i) * kLanes));
      }
      float* highest = softmaxes.highest + group * kLanes + lane;
      float* total = softmaxes.total + group * kLanes + lane;
      const F before = load(highest);
      const F now = max(before, max(max(most[0], most[1]), max(most[2], most[3])) * factor);
      // Lanes that have seen nothing yet: any number will do, but infinity.
      const F shown = max(now, splat(-1e30f));
      if (greater(now, before) != 0) {
        const F keep = power(before - shown);
        store(highest, now);
        store(total, load(total) * keep);
        float* value = softmaxes.values_of(group) + lane;
        for (int64_t row = 0; row < channels_; ++row, value += kLanes) {
          store(value, load(value) * keep);
        }
      }
      F sums[2] = {splat(0), splat(0)};
      const F least = splat(0) - shown;
      for (int64_t t = 0; t < tokens; t += 2) {
        F weight[2];
        for (int i = 0; i < 2; ++i) {
          weight[i] = Units::weight(fma(load(score + (t + i) * kLanes), factor, least));
          sums[i] = sums[i] + weight[i];
        }
        Units::store_weights(weights + lane, t, weight[0], weight[1]);
      }
      store(total, load(total) + (sums[0] + sums[1]));
    }
  }

  // Where a tile's K and V can be read as they lie, or a packed copy.
  template <class T>
  TileView<Units> view_tile(const Desk<Units>& desk, const Lot& lot, int64_t first, int64_t count,
                            int64_t last) const {
    TileView<Units> tile;
    tile.first = first;
    tile.count = count;
    const Cache &key = op_.key_cache, &value = op_.value_cache;
    const bool key_fits = is_element<T>() && key.channel == 1 && channels_ == size_;
    const bool value_fits =
        Units::kPair == 1 && is_element<T>() && value.channel == 1 && channels_ == size_;
    tile.key_token = key_fits ? key.token : channels_;
    tile.value_row = kTileTokens;
    tile.value_step = value_fits ? value.token : channels_;
    const int64_t block_size = op_.shape.block_size;
    const int32_t* table = op_.block_table.data + lot.row * op_.block_table.stride;
    for (int64_t run = 0; run * kRunTokens < count; ++run) {
      const int64_t position = first + run * kRunTokens;
      const int64_t tokens = smaller(kRunTokens, count - run * kRunTokens);
      const int64_t block = table[position / block_size], offset = position % block_size;
      const T* keys = at<T>(key, block, lot.head, offset, 0);
      const T* rows = at<T>(value, block, lot.head, offset, 0);
      tile.key[run] = desk.key + run * kRunTokens * channels_;
      tile.value[run] = desk.value + run * kRunTokens * channels_;
      if (key_fits) {
        tile.key[run] = reinterpret_cast<const Element*>(keys);
      } else {
        pack(keys, key, tokens, desk.key + run * kRunTokens * channels_);
      }
      if constexpr (Units::kPair > 1) {
        // Of the run in the same place of the next tile; beyond the table, of this one.
        const int64_t later = position + kTileTokens;
        const int64_t next = later <= last ? later : position;
        const int64_t soon = table[next / block_size], place = next % block_size;
        const char* const ahead[2] = {
            reinterpret_cast<const char*>(at<T>(key, soon, lot.head, place, 0)),
            reinterpret_cast<const char*>(at<T>(value, soon, lot.head, place, 0))};
        Units::turn(rows, value.token, value.channel, tokens, size_, desk.value + run * kRunTokens,
                    kTileTokens, channels_, ahead);
      } else if (value_fits) {
        tile.value[run] = reinterpret_cast<const Element*>(rows);
      } else {
        pack(rows, value, tokens, desk.value + run * kRunTokens * channels_);
      }
    }
    if constexpr (Units::kPair > 1) tile.value[0] = desk.value;
    return tile;
  }

  template <class T>
  static constexpr bool is_element() {
    return __is_same(T, Element);
  }

  // Rows of elements, zeros behind their channels.
  //   to: [kRunTokens, channels]; rows beyond the tokens are left as they are
  template <class T>
  void pack(const T* from, const Cache& cache, int64_t tokens, Element* to) const {
    for (int64_t t = 0; t < tokens; ++t, to += channels_) {
      const T* row = from + t * cache.token;
      if (cache.channel == 1) {
        Units::pack_row(to, row, size_);
      } else {
        for (int64_t c = 0; c < size_; ++c) Units::pack_one(to + c, row[c * cache.channel]);
      }
      for (int64_t c = size_; c < channels_; ++c) to[c] = Element{};
    }
  }

  // Add what the sink logits weigh. One that outweighs all tokens, infinitely in floats, makes the
  // output 0.
  void count_sinks(const Lot& lot, int64_t group, int64_t lanes, const Softmaxes& softmaxes) const {
    const int64_t first = lot.first + group * kLanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t head = lot.head * per_token_ + (first + lane) % per_token_;
      const int64_t at = group * kLanes + lane;
      const float sink = op_.sink_logits[head] * kLog2E - softmaxes.highest[at];
      softmaxes.total[at] += __builtin_exp2f(sink);
    }
  }

  template <class T>
  void finish(const Lot& lot, const Softmaxes& softmaxes) const {
    for (int64_t group = 0; group * kLanes < lot.count; ++group) {
      T* rows[kLanes];
      const int64_t lanes = smaller(kLanes, lot.count - group * kLanes);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t i = lot.first + group * kLanes + lane;
        rows[lane] = static_cast<T*>(op_.output) + place(lot, i, op_.output_token, op_.output_head);
      }
      if (op_.sink_logits != nullptr) count_sinks(lot, group, lanes, softmaxes);
      Units::give(rows, static_cast<int>(lanes), softmaxes.values_of(group),
                  softmaxes.total + group * kLanes, size_);
    }
  }

  const ExactAttention& op_;
  const int64_t size_, channels_, per_token_;
  const float factor_;
  int64_t lot_queries_ = 0, count_ = 0, most_segments_ = 1;
  Lot* lots_ = nullptr;
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
