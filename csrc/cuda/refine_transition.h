// The transition's product: this CTA's part of U = W A, whose rows it pushes to the CTAs that own them.
#pragma once

#include "refine_clip.h"

namespace rru::RRU_PLATFORM {

// Parts of U. Arrays are registers: loops over them are unrolled.
template <Operands OPERANDS, int WARPS, int TILES>
class Transition {
  using C = Cut<OPERANDS, WARPS, TILES>;
  using At = Shared<C>;

 public:
  // Brings the weights on chip.
  DEVICE explicit Transition(const Clip<OPERANDS, WARPS, TILES>& clip) : clip_(clip) {
    const uint4* w = clip_.packed(clip_.plan.layout.w) + clip_.rank * C::kSlices * C::kSliceUnits;
    UNROLL for (int k = 0; k < C::kSlicesFirst && !C::kFma; k++) {
      UNROLL for (int m = 0; m < 2; m++) {
        w_[k][m] = load_const(w + (k * 2 * WARPS + 2 * clip_.warp + m) * 32 + clip_.lane);
      }
    }
    for (int i = clip_.t; i < C::kSlicesShared * C::kSliceUnits; i += C::kThreads) {
      shared_at<uint4>(At::kW)[i] = load_const(w + C::kSlicesFirst * C::kSliceUnits + i);
    }
  }

  // Pushes rows [32 warp, + 32) of this CTA's part of U = W A to their owners, half of the positions after the other.
  DEVICE void multiply() {
    constexpr int kTiles = TILES / 2;
    UNROLL for (int half = 0; half < 2; half++) {
      float part[2][kTiles][4] = {};
      if constexpr (C::kFma) {
        const uint4* w = clip_.packed(clip_.plan.layout.w) + clip_.rank * C::kSlices * C::kSliceUnits;
        for (int k = 0; k < C::kSlicesFirst; k++) {
          multiply_slice_fp32(part, k, half, [&](int i) { return load_const(w + k * C::kSliceUnits + i); });
        }
        for (int k = C::kSlicesFirst; k < C::kSlices; k++) {
          const uint4* own = shared_at<uint4>(At::kW) + (k - C::kSlicesFirst) * C::kSliceUnits;
          multiply_slice_fp32(part, k, half, [&](int i) { return own[i]; });
        }
      } else {
        UNROLL for (int k = 0; k < C::kSlices; k++) {
          uint4 w[2];
          UNROLL for (int m = 0; m < 2; m++) {
            if (k < C::kSlicesFirst) {
              w[m] = w_[k < C::kSlicesFirst ? k : 0][m];
            } else {
              const int tile = (k - C::kSlicesFirst) * 2 * WARPS + 2 * clip_.warp + m;
              w[m] = shared_at<uint4>(At::kW)[tile * 32 + clip_.lane];
            }
          }
          multiply_slice(part, w, k, half);
        }
      }
      UNROLL for (int m = 0; m < 2; m++) {
        push_rows<0>(16 * m, half, part[m]);
        push_rows<2>(16 * m + 8, half, part[m]);
      }
    }
    if (clip_.t == 0) {
      inbox_arm(kU, C::kD * ((clip_.a.positions + 7) / 8 * 8) * 4, "parts of U are expected");
    }
  }

 private:
  DEVICE void multiply_slice(float (&part)[2][TILES / 2][4], const uint4 (&w)[2], int k, int half) {
    constexpr int kTiles = TILES / 2;
    if constexpr (C::k16Bit) {
      UNROLL for (int tile = 0; tile < kTiles; tile += 2) {
        const int row = k * 16 + clip_.lane % 16, column = half * C::kRun + tile * 8 + clip_.lane / 16 * 8;
        uint32_t b[4];
        ldmatrix_x4_trans(b, smem() + At::kA + (row * C::kStride + column) * 2);
        UNROLL for (int m = 0; m < 2; m++) {
          multiply_16_bit(part[m][tile], w[m], b[0], b[1]);
          multiply_16_bit(part[m][tile + 1], w[m], b[2], b[3]);
        }
      }
    } else {
      UNROLL for (int tile = 0; tile < kTiles; tile++) {
        const int row = k * 8 + clip_.lane % 4, column = half * C::kRun + tile * 8 + clip_.lane / 4;
        const auto* from = shared_at<uint32_t>(At::kA) + row * C::kStride + column;
        const uint32_t b0 = from[0], b1 = from[4 * C::kStride];
        if constexpr (OPERANDS == Operands::tf32) {
          UNROLL for (int m = 0; m < 2; m++) {
            mma_tf32(part[m][tile], w[m], round_tf32(b0), round_tf32(b1));
          }
        } else {
          const uint32_t high0 = high_part(b0), high1 = high_part(b1);
          const uint32_t low0 = low_part(b0), low1 = low_part(b1);
          UNROLL for (int m = 0; m < 2; m++) {
            const uint4 high = make_uint4(high_part(w[m].x), high_part(w[m].y), high_part(w[m].z), high_part(w[m].w));
            const uint4 low = make_uint4(low_part(w[m].x), low_part(w[m].y), low_part(w[m].z), low_part(w[m].w));
            mma_tf32(part[m][tile], low, high0, high1);
            mma_tf32(part[m][tile], high, low0, low1);
            mma_tf32(part[m][tile], high, high0, high1);
          }
        }
      }
    }
  }

  // Without tensor cores: a thread has the elements that a fragment of the sum would give it.
  template <class W>
  DEVICE void multiply_slice_fp32(float (&part)[2][TILES / 2][4], int k, int half, W w) {
    UNROLL for (int quarter = 0; quarter < C::kDepth / 4; quarter++) {
      float rows[2][2][4];
      UNROLL for (int m = 0; m < 2; m++) {
        UNROLL for (int i = 0; i < 2; i++) {
          const uint4 v = w(quarter * C::kD + 32 * clip_.warp + 16 * m + 8 * i + clip_.lane / 4);
          rows[m][i][0] = uint_as_float(v.x);
          rows[m][i][1] = uint_as_float(v.y);
          rows[m][i][2] = uint_as_float(v.z);
          rows[m][i][3] = uint_as_float(v.w);
        }
      }
      UNROLL for (int c = 0; c < 4; c++) {
        const float* row = shared_at<float>(At::kA) + (8 * k + 4 * quarter + c) * C::kStride;
        const float* from = row + half * C::kRun + clip_.lane % 4 * 2;
        UNROLL for (int tile = 0; tile < TILES / 2; tile++) {
          const float2 a = *reinterpret_cast<const float2*>(from + 8 * tile);
          UNROLL for (int m = 0; m < 2; m++) {
            UNROLL for (int i = 0; i < 2; i++) {
              part[m][tile][2 * i] += rows[m][i][c] * a.x;
              part[m][tile][2 * i + 1] += rows[m][i][c] * a.y;
            }
          }
        }
      }
    }
  }

  DEVICE static void multiply_16_bit(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (OPERANDS == Operands::bf16) {
      mma_bf16(d, a, b0, b1);
    } else {
      mma_f16(d, a, b0, b1);
    }
  }

  // The two TF32 numbers whose sum is fp32, but for its last two bits.
  DEVICE static uint32_t high_part(uint32_t bits) {
    return round_tf32(bits) & ~0x1fffu;
  }
  DEVICE static uint32_t low_part(uint32_t bits) {
    return round_tf32(float_as_uint(quiet(uint_as_float(bits) - uint_as_float(high_part(bits)))));
  }

  // Pushes one row per four lanes: elements FIRST and FIRST + 1 of the tiles' fragments.
  template <int FIRST>
  DEVICE void push_rows(int row_of_warp, int half, const float (&part)[TILES / 2][4]) {
    const int row = 32 * clip_.warp + row_of_warp + clip_.lane / 4;
    const Peer owner = peer(row >> clip_.plan.log2_rows);
    const int offset = clip_.inbox_u(clip_.rank, row & (clip_.rows() - 1), clip_.lane % 4 * 2);
    UNROLL for (int i = 0; i < TILES / 2; i++) {
      const int tile = half * (TILES / 2) + i;
      if (8 * tile < clip_.a.positions) {  // by exclusive or: a tile's 32 bytes are aligned
        push(owner, offset ^ 32 * tile, float2{part[i][FIRST], part[i][FIRST + 1]}, kU);
      }
    }
  }

  const Clip<OPERANDS, WARPS, TILES>& clip_;
  uint4 w_[C::kSlicesFirst][2];
};

}  // namespace rru::RRU_PLATFORM
