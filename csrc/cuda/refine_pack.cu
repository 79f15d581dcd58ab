// Weights of refine in the order in which the threads of its kernels read them, 16 bytes at a time.

#include "refine_layout.h"

namespace rru::RRU_PLATFORM {

namespace {

DEVICE float load_as_float(const AnyTensor& tensor, int64_t i) {
  if (tensor.dtype == Dtype::float32) {
    return load_const(static_cast<const float*>(tensor.data) + i);
  }
  const uint32_t bits = load_const(static_cast<const unsigned short*>(tensor.data) + i);
  return tensor.dtype == Dtype::float16 ? f16_low(bits) : bf16_low(bits);
}

struct Packing {
  RefineWeights weights;
  PackedLayout layout;
  uint4* packed;
};

template <class C, Pass PASS>
class Packer {
 public:
  DEVICE explicit Packer(const Packing& p) : p_(p), w_(p.weights) {}

  DEVICE uint4 unit(int i) const {
    const PackedLayout& l = p_.layout;
    const int w_end = l.norm - C::kAhead * C::kSliceUnits;
    return i < w_end  ? transition(i)
        : i < l.norm ? make_uint4(0, 0, 0, 0)
        : i < l.w_s1  ? norm(i - l.norm)
        : i < l.w_s2  ? spatial_1(i - l.w_s1)
        : i < l.w_c   ? spatial_2(i - l.w_s2)
                      : channel(i - l.w_c);
  }

 private:
  DEVICE static uint4 floats(float x, float y, float z, float w) {
    return make_uint4(float_as_uint(x), float_as_uint(y), float_as_uint(z), float_as_uint(w));
  }

  // An element of the product's left operand: of W, or of its transpose in the backward.
  DEVICE float w(int rank, int row, int term) const {
    const int own_channel = PASS == Pass::backward ? row : term, d = PASS == Pass::backward ? term : row;
    const int c = rank * C::kChannels + own_channel;
    return d < w_.d && c < w_.channels ? load_as_float(w_.w, d * w_.w_row + c) : 0.f;
  }

  DEVICE uint4 transition(int i) const {
    constexpr int kRows = PASS == Pass::backward ? C::kChannels : C::kD;
    constexpr int kSlices = PASS == Pass::backward ? C::kSlicesD : C::kSlices;
    constexpr int kUnits = C::kFma ? kRows * C::kDepth / 4 : kRows * 2;  // of a slice
    const int rank = i / (kSlices * kUnits);
    i %= kSlices * kUnits;
    if constexpr (C::kFma) {
      const int row = i % kRows, term = i / kUnits * C::kDepth + i / kRows % 2 * 4;
      return floats(w(rank, row, term), w(rank, row, term + 1), w(rank, row, term + 2), w(rank, row, term + 3));
    }
    const int lane = i % 32;
    if constexpr (PASS == Pass::backward) {  // a warp's tiles of a slice together, and its slices
      const int m = i / 32 % C::kMultiple, slice = i / 32 / C::kMultiple % kSlices;
      return fragment(rank, (i / 32 / C::kMultiple / kSlices * C::kMultiple + m) * 16, slice, lane);
    } else {
      return fragment(rank, i / 32 % (2 * C::kWarps) * 16, i / kUnits, lane);
    }
  }

  // The four registers of an A operand: rows q and q + 8, then the same at the later half of the depth.
  DEVICE uint4 fragment(int rank, int first_row, int slice, int lane) const {
    const int row = first_row + lane / 4, term = slice * C::kDepth + lane % 4 * (C::k16Bit ? 2 : 1);
    uint32_t words[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int r = row + 8 * (j & 1), k = term + (j >> 1) * C::kDepth / 2;
      if (C::k16Bit) {
        words[j] = pack_halves<C::kOperands>(w(rank, r, k), w(rank, r, k + 1));
      } else {
        const uint32_t bits = float_as_uint(quiet(w(rank, r, k)));
        words[j] = C::kOperands == Operands::tf32x3 ? bits : round_tf32(bits) & ~0x1fffu;
      }
    }
    if (RRU_MUTANT("fragment transposed")) {
      return make_uint4(words[0], words[2], words[1], words[3]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // In eval mode scales, then shifts: the norm is u * scale + shift. Else gamma, then beta.
  DEVICE uint4 norm(int i) const {
    float values[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int d = (4 * i + j) % C::kD;
      values[j] = 0.f;
      if (d < w_.d) {
        const bool first = 4 * i < C::kD;
        if (PASS == Pass::eval) {
          const float scale = load_as_float(w_.gamma, d) / sqrtf(load_as_float(w_.running_var, d) + w_.eps);
          values[j] = first ? scale : load_as_float(w_.beta, d) - load_as_float(w_.running_mean, d) * scale;
        } else {
          values[j] = load_as_float(first ? w_.gamma : w_.beta, d);
        }
      }
    }
    return floats(values[0], values[1], values[2], values[3]);
  }

  // An element of the spatial attention's two products: w_s1 (A, P) and w_s2 (P, A), in the backward their transposes.
  DEVICE float spatial(bool first, int a, int p) const {
    const bool is_w_s1 = first != (PASS == Pass::backward);
    const AnyTensor& weight = is_w_s1 ? w_.w_s1 : w_.w_s2;
    if (weight.data == nullptr || a >= w_.num_attn || p >= w_.positions) {
      return 0.f;
    }
    return load_as_float(weight, is_w_s1 ? a * w_.positions + p : p * w_.num_attn + a);
  }

  DEVICE uint4 spatial_1(int i) const {
    const int t = i % C::kThreads, p = t % 2 * C::kRun + 4 * (i / C::kThreads);
    return floats(
        spatial(true, t / 2, p), spatial(true, t / 2, p + 1), spatial(true, t / 2, p + 2),
        spatial(true, t / 2, p + 3));
  }

  DEVICE uint4 spatial_2(int i) const {
    const int t = i % C::kThreads, chunk = i / C::kThreads;
    const int p = chunk / C::kWarps * 8 * C::kWarps + t / 4, a = t % 4 * 4 * C::kWarps + 4 * (chunk % C::kWarps);
    return floats(
        spatial(false, a, p), spatial(false, a + 1, p), spatial(false, a + 2, p), spatial(false, a + 3, p));
  }

  DEVICE float w_c(int c, int d) const {
    return c < w_.channels && d < w_.d ? load_as_float(w_.w_c, static_cast<int64_t>(c) * w_.d + d) : 0.f;
  }

  // For refine_eval by thread, half of a channel's row; else rows (C, kD).
  DEVICE uint4 channel(int i) const {
    const int size = p_.layout.w_c_is_float ? 4 : 8, rank = i / p_.layout.w_c_units;
    i %= p_.layout.w_c_units;
    const int t = i % C::kThreads, row_units = C::kD / size;
    const int own_channel = PASS == Pass::eval ? t / 2 : i / row_units;
    const int d = PASS == Pass::eval ? t % 2 * (C::kD / 2) + i / C::kThreads * size : i % row_units * size;
    const int c = rank * C::kChannels + own_channel;
    if (w_.w_c.data == nullptr) {
      return make_uint4(0, 0, 0, 0);
    }
    if (p_.layout.w_c_is_float) {
      return floats(w_c(c, d), w_c(c, d + 1), w_c(c, d + 2), w_c(c, d + 3));
    }
    uint32_t words[4];
    UNROLL for (int j = 0; j < 4; j++) {
      words[j] = pack_halves<C::kOperands>(w_c(c, d + 2 * j), w_c(c, d + 2 * j + 1));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  const Packing& p_;
  const RefineWeights& w_;
};

constexpr int kPackThreads = 128;

template <Pass PASS, Operands OPERANDS, int WARPS, int TILES, int MULTIPLE>
RRU_GLOBAL(kPackThreads) refine_pack_kernel(const RRU_PARAMETER Packing p) {
  const int i = cta() * kPackThreads + thread();
  if (i < p.layout.end) {
    store(p.packed + i, Packer<Cut<OPERANDS, WARPS, TILES, MULTIPLE>, PASS>(p).unit(i));
  }
}

// Calls `f` with the layout of the weights, and the kernel that packs them.
template <Pass PASS, class F>
void with_packing_of(const RefineWeights& w, F f) {
  const int multiple = PASS == Pass::eval ? 1 : w.multiple;
  with_cut<PASS>(
      operands_of(w.dtype, w.float32, PASS), {warps_of(w, multiple), multiple}, w.positions,
      [&]<Operands O, int WARPS, int TILES, int MULTIPLE>() {
        const bool is_float = w.w_c.dtype == Dtype::float32;
        f(packed_layout<Cut<O, WARPS, TILES, MULTIPLE>>(w.channels, is_float),
          &refine_pack_kernel<PASS, O, WARPS, TILES, MULTIPLE>);
      });
}

template <class F>
void with_packing(const RefineWeights& w, F f) {
  w.pass == Pass::eval      ? with_packing_of<Pass::eval>(w, f)
      : w.pass == Pass::forward ? with_packing_of<Pass::forward>(w, f)
                                : with_packing_of<Pass::backward>(w, f);
}

}  // namespace

int64_t refine_packed_bytes(const RefineWeights& weights) {
  int64_t bytes = 0;
  with_packing(weights, [&](const PackedLayout& layout, auto) { bytes = 16 * static_cast<int64_t>(layout.end); });
  return bytes;
}

void refine_pack(const RefineWeights& weights, void* packed, int device, void* stream) {
  with_packing(weights, [&](const PackedLayout& layout, auto kernel) {
    const Launch l{device, stream, (layout.end + kPackThreads - 1) / kPackThreads, 1, kPackThreads, 0};
    launch(kernel, l, Packing{weights, layout, static_cast<uint4*>(packed)});
  });
}

}  // namespace rru::RRU_PLATFORM
