// Weights of refine_eval in the order in which its threads read them, 16 bytes at a time.

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

template <class C, Operands OPERANDS, int WARPS>
class Packer {
 public:
  DEVICE explicit Packer(const Packing& p) : p_(p), w_(p.weights) {}

  DEVICE uint4 unit(int i) const {
    const PackedLayout& l = p_.layout;
    return i < l.norm ? transition(i)
        : i < l.w_s1  ? norm(i - l.norm)
        : i < l.w_s2  ? spatial_1(i - l.w_s1)
        : i < l.w_c   ? spatial_2(i - l.w_s2)
                      : channel(i - l.w_c);
  }

 private:
  DEVICE static uint4 floats(float x, float y, float z, float w) {
    return make_uint4(float_as_uint(x), float_as_uint(y), float_as_uint(z), float_as_uint(w));
  }

  DEVICE float w(int d, int c) const {
    return d < w_.d && c < w_.channels ? load_as_float(w_.w, d * w_.w_row + c) : 0.f;
  }

  DEVICE uint4 transition(int i) const {
    if constexpr (C::kFma) {
      const int row = i % C::kD, c = i / C::kSliceUnits * C::kDepth + i / C::kD % 2 * 4;
      return floats(w(row, c), w(row, c + 1), w(row, c + 2), w(row, c + 3));
    } else {
      return fragment(i);
    }
  }

  // The four registers of an A operand: rows q and q + 8, then the same at the later half of the depth.
  DEVICE uint4 fragment(int i) const {
    const int lane = i % 32, tile = i / 32 % (2 * WARPS), slice = i / C::kSliceUnits % C::kSlices;
    const int rank = i / (C::kSliceUnits * C::kSlices);
    const int row = 16 * tile + lane / 4;
    const int c = rank * C::kChannels + slice * C::kDepth + lane % 4 * (C::k16Bit ? 2 : 1);
    uint32_t words[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int d = row + 8 * (j & 1), k = c + (j >> 1) * C::kDepth / 2;
      if (C::k16Bit) {
        words[j] = pack_halves<OPERANDS>(w(d, k), w(d, k + 1));
      } else {
        const uint32_t bits = float_as_uint(quiet(w(d, k)));
        words[j] = OPERANDS == Operands::tf32 ? round_tf32(bits) & ~0x1fffu : bits;
      }
    }
    if (RRU_MUTANT("fragment transposed")) {
      return make_uint4(words[0], words[2], words[1], words[3]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // Scales, then shifts: the norm is u * scale + shift.
  DEVICE uint4 norm(int i) const {
    float values[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int d = (4 * i + j) % C::kD;
      values[j] = 0.f;
      if (d < w_.d) {
        const float scale = load_as_float(w_.gamma, d) / sqrtf(load_as_float(w_.running_var, d) + w_.eps);
        values[j] = 4 * i < C::kD ? scale : load_as_float(w_.beta, d) - load_as_float(w_.running_mean, d) * scale;
      }
    }
    return floats(values[0], values[1], values[2], values[3]);
  }

  DEVICE float spatial(const AnyTensor& weight, int a, int p) const {
    if (weight.data == nullptr || a >= w_.num_attn || p >= w_.positions) {
      return 0.f;
    }
    return load_as_float(weight, weight.data == w_.w_s1.data ? a * w_.positions + p : p * w_.num_attn + a);
  }

  DEVICE uint4 spatial_1(int i) const {
    const int t = i % C::kThreads, p = t % 2 * C::kRun + 4 * (i / C::kThreads);
    return floats(
        spatial(w_.w_s1, t / 2, p), spatial(w_.w_s1, t / 2, p + 1), spatial(w_.w_s1, t / 2, p + 2),
        spatial(w_.w_s1, t / 2, p + 3));
  }

  DEVICE uint4 spatial_2(int i) const {
    const int t = i % C::kThreads, chunk = i / C::kThreads;
    const int p = chunk / WARPS * 8 * WARPS + t / 4, a = t % 4 * 4 * WARPS + 4 * (chunk % WARPS);
    return floats(
        spatial(w_.w_s2, a, p), spatial(w_.w_s2, a + 1, p), spatial(w_.w_s2, a + 2, p), spatial(w_.w_s2, a + 3, p));
  }

  DEVICE float w_c(int c, int d) const {
    return c < w_.channels && d < w_.d ? load_as_float(w_.w_c, static_cast<int64_t>(c) * w_.d + d) : 0.f;
  }

  DEVICE uint4 channel(int i) const {
    const int rank = i / p_.layout.w_c_units, t = i % C::kThreads, chunk = i % p_.layout.w_c_units / C::kThreads;
    const int c = rank * C::kChannels + t / 2, d = t % 2 * (C::kD / 2);
    if (w_.w_c.data == nullptr) {
      return make_uint4(0, 0, 0, 0);
    }
    if (p_.layout.w_c_is_float) {
      const int from = d + 4 * chunk;
      return floats(w_c(c, from), w_c(c, from + 1), w_c(c, from + 2), w_c(c, from + 3));
    }
    uint32_t words[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int from = d + 8 * chunk + 2 * j;
      words[j] = pack_halves<OPERANDS>(w_c(c, from), w_c(c, from + 1));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  const Packing& p_;
  const RefineWeights& w_;
};

constexpr int kPackThreads = 128;

template <Operands OPERANDS, int WARPS, int TILES>
RRU_GLOBAL(kPackThreads) refine_pack_kernel(const RRU_PARAMETER Packing p) {
  const int i = cta() * kPackThreads + thread();
  if (i < p.layout.end) {
    store(p.packed + i, Packer<Cut<OPERANDS, WARPS, TILES>, OPERANDS, WARPS>(p).unit(i));
  }
}

template <class C>
PackedLayout layout_of(const RefineWeights& w) {
  return packed_layout<C>(w.channels, w.w_c.dtype == Dtype::float32);
}

}  // namespace

int64_t refine_packed_bytes(const RefineWeights& weights) {
  return with_cut(shape_of(weights), [&]<Operands O, int WARPS, int TILES>() -> int64_t {
    return 16 * static_cast<int64_t>(layout_of<Cut<O, WARPS, TILES>>(weights).end);
  });
}

void refine_pack(const RefineWeights& weights, void* packed, int device, void* stream) {
  with_cut(shape_of(weights), [&]<Operands O, int WARPS, int TILES>() {
    const PackedLayout layout = layout_of<Cut<O, WARPS, TILES>>(weights);
    const Launch l{device, stream, (layout.end + kPackThreads - 1) / kPackThreads, 1, kPackThreads, 0};
    launch(&refine_pack_kernel<O, WARPS, TILES>, l, Packing{weights, layout, static_cast<uint4*>(packed)});
  });
}

}  // namespace rru::RRU_PLATFORM
