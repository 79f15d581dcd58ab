// Products of weights with an operand in shared memory, rows of kStride elements: on tensor cores, or in fp32 without.
#pragma once

#include "refine_clip.h"

namespace rru::RRU_PLATFORM {

// The two TF32 numbers whose sum is fp32, but for its last two bits.
DEVICE uint32_t high_part(uint32_t bits) {
  return round_tf32(bits) & ~0x1fffu;
}
DEVICE uint32_t low_part(uint32_t bits) {
  return round_tf32(float_as_uint(quiet(uint_as_float(bits) - uint_as_float(high_part(bits)))));
}
DEVICE uint4 high_part(const uint4& w) {
  return make_uint4(high_part(w.x), high_part(w.y), high_part(w.z), high_part(w.w));
}
DEVICE uint4 low_part(const uint4& w) {
  return make_uint4(low_part(w.x), low_part(w.y), low_part(w.z), low_part(w.w));
}

template <class C>
DEVICE void multiply_16_bit(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (C::kOperands == Operands::bf16) {
    mma_bf16(d, a, b0, b1);
  } else {
    mma_f16(d, a, b0, b1);
  }
}

// Adds slice k of a product to sums, M tiles of 16 rows and COUNT tiles of 8 positions from `first`, as fragments.
template <class C, int M, int COUNT>
DEVICE void multiply_slice(float (&sums)[M][COUNT][4], const uint4 (&w)[M], int operand, int k, int first, int lane) {
  if constexpr (C::k16Bit) {
    UNROLL for (int tile = 0; tile < COUNT; tile += 2) {
      const int row = k * 16 + lane % 16, column = first + tile * 8 + lane / 16 * 8;
      uint32_t b[4];
      ldmatrix_x4_trans(b, smem() + operand + (row * C::kStride + column) * 2);
      UNROLL for (int m = 0; m < M; m++) {
        multiply_16_bit<C>(sums[m][tile], w[m], b[0], b[1]);
        multiply_16_bit<C>(sums[m][tile + 1], w[m], b[2], b[3]);
      }
    }
  } else {
    UNROLL for (int tile = 0; tile < COUNT; tile++) {
      const int row = k * 8 + lane % 4, column = first + tile * 8 + lane / 4;
      const auto* from = shared_at<uint32_t>(operand) + row * C::kStride + column;
      const uint32_t b0 = from[0], b1 = from[4 * C::kStride];
      if constexpr (C::kOperands == Operands::tf32x3) {
        const uint32_t high0 = high_part(b0), high1 = high_part(b1);
        const uint32_t low0 = low_part(b0), low1 = low_part(b1);
        UNROLL for (int m = 0; m < M; m++) {
          const uint4 high = high_part(w[m]), low = low_part(w[m]);
          mma_tf32(sums[m][tile], low, high0, high1);
          mma_tf32(sums[m][tile], high, low0, low1);
          mma_tf32(sums[m][tile], high, high0, high1);
        }
      } else {
        UNROLL for (int m = 0; m < M; m++) {
          mma_tf32(sums[m][tile], w[m], round_tf32(b0), round_tf32(b1));
        }
      }
    }
  }
}

// The same without tensor cores: a thread has the elements that a fragment of the sum would give it. `w` returns a unit
// of this slice's weights, rows of `all_rows`; `row` is the first.
template <class C, int M, int COUNT, class W>
DEVICE void multiply_slice_fp32(
    float (&sums)[M][COUNT][4], int operand, int k, int first, int lane, int row, int all_rows, W w) {
  UNROLL for (int quarter = 0; quarter < C::kDepth / 4; quarter++) {
    float rows[M][2][4];
    UNROLL for (int m = 0; m < M; m++) {
      UNROLL for (int i = 0; i < 2; i++) {
        const uint4 v = w(quarter * all_rows + row + 16 * m + 8 * i + lane / 4);
        rows[m][i][0] = uint_as_float(v.x);
        rows[m][i][1] = uint_as_float(v.y);
        rows[m][i][2] = uint_as_float(v.z);
        rows[m][i][3] = uint_as_float(v.w);
      }
    }
    UNROLL for (int c = 0; c < 4; c++) {
      const float* from =
          shared_at<float>(operand) + (8 * k + 4 * quarter + c) * C::kStride + first + lane % 4 * 2;
      UNROLL for (int tile = 0; tile < COUNT; tile++) {
        const float2 b = *reinterpret_cast<const float2*>(from + 8 * tile);
        UNROLL for (int m = 0; m < M; m++) {
          UNROLL for (int i = 0; i < 2; i++) {
            sums[m][tile][2 * i] += rows[m][i][c] * b.x;
            sums[m][tile][2 * i + 1] += rows[m][i][c] * b.y;
          }
        }
      }
    }
  }
}

}  // namespace rru::RRU_PLATFORM
