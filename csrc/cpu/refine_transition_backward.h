// The transition, backward: the gradient of its input, W^T dU, and of its weight, transposed, V dU^T.
#pragma once

#include <algorithm>
#include <utility>

#include "refine_transition.h"

namespace rru {
namespace CPU_CAPABILITY {

// dU of the current frame, packed as right operands.
template <typename Operand>
class PackedDU {
  using Acc = at::opmath_type<Operand>;
  static constexpr int64_t kPack = kVnni<Operand>;

 public:
  const int64_t clip_rows;  // rows per clip of du_transposed: P rounded up to kVnni
  // Per clip and chunk, (D, n): dU_t, and dU_t - dU_{t+1}, which W_m^T sends to dX_t. Where both segments of the gate's
  // input are equal, W_a + W_m multiplies dU_t, and the difference is -dU_{t+1} alone.
  const Array<Operand> du, du_difference;
  const Array<Operand> du_transposed;  // per block of kTileN gate channels, (B clip_rows, kTileN)

  explicit PackedDU(const Sizes& s)
      : clip_rows(round_up(s.P, kPack)),
        du(Array<Operand>::empty({s.B, s.num_chunks, round_up(s.D, kPack) * kMaxRow})),
        du_difference(Array<Operand>::empty({s.B, s.num_chunks, round_up(s.D, kPack) * kMaxRow})),
        du_transposed(Array<Operand>::empty({(s.D + kTileN - 1) / kTileN, s.B * clip_rows, kTileN})),
        sizes_(s) {}

  // Packs one clip's dU_t, (D, P) in chunks; du_next is its dU_{t+1}, null at the last frame.
  void pack(int64_t clip, int64_t t, const Acc* du_t, const Acc* du_next) const {
    for (int64_t q = 0; q < sizes_.num_chunks; q++) {
      const int64_t begin = sizes_.D * sizes_.chunk(q).p0;
      pack_rows_of_chunk(clip, q, t, du_t + begin, du_next == nullptr ? nullptr : du_next + begin);
      pack_transposed(clip, q, du_t + begin);
    }
  }

 private:
  void pack_rows_of_chunk(int64_t clip, int64_t q, int64_t t, const Acc* du_t, const Acc* du_next) const {
    const Chunk chunk = sizes_.chunk(q);
    const int64_t n = chunk.n;
    for (int64_t d = 0; d < sizes_.D; d += kPack) {
      alignas(64) Acc rows[kPack * kMaxRow] = {}, differences[kPack * kMaxRow] = {};
      for (int64_t i = 0; i < kPack && d + i < sizes_.D; i++) {
        const Acc *row = du_t + (d + i) * n, *next = du_next == nullptr ? nullptr : du_next + (d + i) * n;
        for (int64_t p = 0; p < n; p++) {
          rows[i * kMaxRow + p] = row[p];
          differences[i * kMaxRow + p] =
              (sizes_.segments_equal(t) ? Acc(0) : row[p]) - (next == nullptr ? Acc(0) : next[p]);
        }
      }
      pack_rows(rows, du(clip, q), d, chunk.ld, n);
      if (sizes_.motion) {
        pack_rows(differences, du_difference(clip, q), d, chunk.ld, n);
      }
    }
  }

  void pack_transposed(int64_t clip, int64_t q, const Acc* du_t) const {
    const auto [p0, n, ld] = sizes_.chunk(q);
    for (int64_t d0 = 0; d0 < sizes_.D; d0 += kTileN) {
      const int64_t width = std::min(kTileN, sizes_.D - d0);
      for (int64_t p = 0; p < n; p += kPack) {
        alignas(64) Acc rows[kPack * kMaxRow] = {};
        for (int64_t i = 0; i < kPack && p + i < n; i++) {
          for (int64_t d = 0; d < width; d++) {
            rows[i * kMaxRow + d] = du_t[(d0 + d) * n + p + i];
          }
        }
        pack_rows(rows, du_transposed(d0 / kTileN), clip * clip_rows + p0 + p, kTileN, width);
      }
    }
  }

  const Sizes& sizes_;
};

template <typename Operand>
class TransitionBackward {
  using Acc = at::opmath_type<Operand>;

 public:
  // Channels per task at most: their gradient of W, (channels, D) per segment, stays in the second-level cache.
  static constexpr int64_t kMaxChannels = 64;
  // Positions per product V dU^T at most, of several clips where a clip has few.
  static constexpr int64_t kMaxPositions = 256;

  // A thread's operands and products for one block of channels.
  struct alignas(64) Tile {
    Acc d_first[kMaxChannels * kMaxRow], d_second[kMaxChannels * kMaxRow];  // W^T dU per segment, for one clip's chunk
    // V per segment as left operand, (channels, kMaxPositions), for rows `begin` to `begin + rows` of du_transposed.
    Operand first[kMaxChannels * kMaxPositions], second[kMaxChannels * kMaxPositions];
    int64_t begin, rows;
  };

  TransitionBackward(const RefineArguments& a, RefineNeed need, const Sizes& sizes, const PackedDU<Operand>& packed)
      : sizes_(sizes),
        need_(need),
        packed_(packed),
        d_w_t_(Array<Acc>::zeros({sizes.num_segments, sizes.C, sizes.D})),
        tiles_(Array<uint8_t>::empty({at::get_num_threads(), sizeof(Tile)})) {
    const Tensor w_t = a.w.to(Array<Acc>::kDtype).t();
    w_t_ = left_operand<Operand>(w_t, 1);
    if (sizes.first_segments_equal) {
      w_sum_t_ = left_operand<Operand>(w_t.narrow(0, 0, sizes.C).add(w_t.narrow(0, sizes.C, sizes.C)), 1);
      d_w_sum_t_ = Array<Acc>::zeros({sizes.C, sizes.D});
    }
  }

  // The calling thread's tile.
  Tile& tile() const {
    return *reinterpret_cast<Tile*>(tiles_(at::get_thread_num()));
  }

  // True if W_m sends a gradient to dX_t.
  bool has_motion(int64_t t) const {
    return sizes_.motion && (!sizes_.segments_equal(t) || t + 1 < sizes_.T);
  }

  // tile.d_first, tile.d_second = W^T dU_t per segment, for channels c0 to c1 of one clip's chunk.
  void input_gradient(int64_t clip, int64_t q, int64_t t, int64_t c0, int64_t c1, Tile& tile) const {
    const Operand* du = packed_.du(clip, q);
    if (need_.x || !sizes_.raw) {
      multiply_w_t((sizes_.segments_equal(t) ? w_sum_t_ : w_t_)(c0), du, q, c1 - c0, tile.d_first);
    }
    if (sizes_.raw) {
      multiply_w_t(w_t_(sizes_.C + c0), du, q, c1 - c0, tile.d_second);
    } else if (need_.x && has_motion(t)) {
      multiply_w_t(w_t_(sizes_.C + c0), packed_.du_difference(clip, q), q, c1 - c0, tile.d_second);
    }
  }

  // tile.d_second = W_m^T dU_t.
  void motion_gradient(int64_t clip, int64_t q, int64_t c0, int64_t c1, Tile& tile) const {
    multiply_w_t(w_t_(sizes_.C + c0), packed_.du(clip, q), q, c1 - c0, tile.d_second);
  }

  // Prepares the tile for the rows of one clip's chunk: where they do not follow those it has, or do not fit, the rows
  // it has are multiplied first.
  void begin_chunk(int64_t clip, const Chunk& chunk, int64_t t, int64_t c0, int64_t c1, Tile& tile) const {
    const int64_t row = clip * packed_.clip_rows + chunk.p0;
    if (row != tile.begin + tile.rows || tile.rows + kMaxRow > kMaxPositions) {
      add_weight_gradient(t, c0, c1, tile);
      tile.begin = row;
    }
  }

  // dW^T += V_t dU_t^T for channels c0 to c1 and the rows in the tile, which is empty afterwards.
  void add_weight_gradient(int64_t t, int64_t c0, int64_t c1, Tile& tile) const {
    const int64_t rows = std::exchange(tile.rows, 0);
    if (rows == 0 || !need_.weights) {
      return;
    }
    const auto multiply = [&](const Operand* v, Acc* d_w_t) {
      for (int64_t d = 0; d < sizes_.D; d += kTileN) {
        gemm<Operand>(
            c1 - c0, std::min(kTileN, sizes_.D - d), rows, v, kMaxPositions,
            packed_.du_transposed(d / kTileN, tile.begin), kTileN, d_w_t + d, sizes_.D, true);
      }
    };
    multiply(tile.first, sizes_.segments_equal(t) ? d_w_sum_t_(c0) : d_w_t_(0, c0));
    if (sizes_.num_segments == 2 && !sizes_.segments_equal(t)) {
      multiply(tile.second, d_w_t_(1, c0));
    }
  }

  // The gradient of W, to be called once, after the last frame.
  Tensor d_w(const Tensor& w) const {
    if (sizes_.first_segments_equal) {
      d_w_t_.tensor().add_(d_w_sum_t_.tensor());
    }
    return d_w_t_.tensor().view({sizes_.num_segments * sizes_.C, sizes_.D}).t().to(w.scalar_type()).contiguous();
  }

 private:
  void multiply_w_t(const Operand* w_t, const Operand* du, int64_t q, int64_t channels, Acc* out) const {
    const Chunk chunk = sizes_.chunk(q);
    const int64_t depth = round_up(sizes_.D, kVnni<Operand>);
    gemm<Operand>(channels, chunk.n, depth, w_t, depth, du, chunk.ld, out, kMaxRow, false);
  }

  const Sizes& sizes_;
  const RefineNeed need_;
  const PackedDU<Operand>& packed_;
  Array<const Operand> w_t_, w_sum_t_;  // (num_segments C, D); (C, D), the sum of both segments
  const Array<Acc> d_w_t_;              // (num_segments, C, D)
  Array<Acc> d_w_sum_t_;                // (C, D)
  const Array<uint8_t> tiles_;          // one Tile per thread
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
