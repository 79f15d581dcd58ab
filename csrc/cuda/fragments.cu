// A check of what the kernels take for granted of a GPU: how the tensor cores' fragments are laid out, and that a
// number pushed to another CTA arrives where it should. Run before any other kernel on a GPU that is new.

#include <stdexcept>

#include "refine_layout.h"

namespace rru::RRU_PLATFORM {

namespace {

struct Product {
  const float* a;  // (16, K), K = 16, or 8 in TF32
  const float* b;  // (K, 8)
  float* d;        // (CTAs, 16, 8) what each CTA has received from the next one
};

constexpr int kDepth16 = 16, kDepth8 = 8, kOut = 16 * 8;

template <Operands OPERANDS>
DEVICE void multiply(const Product& p, float (&d)[4]) {
  const int q = thread() / 4, r = thread() % 4;
  if constexpr (Cut<OPERANDS, 1, 4>::k16Bit) {
    // B goes through shared memory, as the A tile does.
    auto* tile = reinterpret_cast<unsigned short*>(smem() + 4 * kOut);
    for (int i = thread(); i < kDepth16 * 8; i += 32) {
      tile[i / 8 * 16 + i % 8] = static_cast<unsigned short>(pack_halves<OPERANDS>(load_const(p.b + i), 0.f));
      tile[i / 8 * 16 + i % 8 + 8] = static_cast<unsigned short>(pack_halves<OPERANDS>(-load_const(p.b + i), 0.f));
    }
    sync("B is written");
    uint32_t b[4];
    ldmatrix_x4_trans(b, tile + thread() % 16 * 16 + thread() / 16 * 8);
    uint32_t a[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const float* from = p.a + (q + 8 * (j & 1)) * kDepth16 + 2 * r + 8 * (j >> 1);
      a[j] = pack_halves<OPERANDS>(load_const(from), load_const(from + 1));
    }
    float negative[4] = {};
    if constexpr (OPERANDS == Operands::bf16) {
      mma_bf16(d, make_uint4(a[0], a[1], a[2], a[3]), b[0], b[1]);
      mma_bf16(negative, make_uint4(a[0], a[1], a[2], a[3]), b[2], b[3]);
    } else {
      mma_f16(d, make_uint4(a[0], a[1], a[2], a[3]), b[0], b[1]);
      mma_f16(negative, make_uint4(a[0], a[1], a[2], a[3]), b[2], b[3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
      d[i] = d[i] == -negative[i] ? d[i] : uint_as_float(0x7fc00000);
    }
  } else {
    uint32_t a[4];
    UNROLL for (int j = 0; j < 4; j++) {
      a[j] = float_as_uint(load_const(p.a + (q + 8 * (j & 1)) * kDepth8 + r + 4 * (j >> 1)));
    }
    const float b0 = load_const(p.b + r * 8 + q), b1 = load_const(p.b + (r + 4) * 8 + q);
    mma_tf32(d, make_uint4(a[0], a[1], a[2], a[3]), float_as_uint(b0), float_as_uint(b1));
  }
}

template <Operands OPERANDS>
RRU_GLOBAL(32) fragments_kernel(const RRU_PARAMETER Product p) {
#ifdef RRU_HAS_CLUSTERS
  if (thread() == 0) {
    inbox_init(1);
  }
  cluster_arrive("inboxes are initialized");
  cluster_wait("inboxes are initialized");
  float d[4] = {};
  multiply<OPERANDS>(p, d);
  const Peer before = peer((rank() + cluster_size() - 1) % cluster_size());
  UNROLL for (int i = 0; i < 4; i += 2) {
    const int row = thread() / 4 + 4 * i, column = thread() % 4 * 2;
    push(before, 4 * (row * 8 + column), float2{d[i], d[i + 1]}, 0);
  }
  if (thread() == 0) {
    inbox_arm(0, 4 * kOut, "a product is expected");
  }
  inbox_wait(0, 0, "a product has arrived");
  const auto* received = reinterpret_cast<const float*>(smem());
  for (int i = thread(); i < kOut; i += 32) {
    store(p.d + cta() * kOut + i, received[i] + 1000.f * static_cast<float>(rank()));
  }
#endif
}

}  // namespace

void fragments(const float* a, const float* b, float* d, Dtype dtype, int ctas, int device, void* stream) {
  const auto run = [&](auto kernel) {
    const Launch l{device, stream, ctas, ctas, 32, 4 * kOut + 2 * 16 * kDepth16};
    std::string reason;
    if (max_clusters(kernel, l, &reason) == 0) {
      throw std::runtime_error(reason);
    }
    launch(kernel, l, Product{a, b, d});
  };
  if (dtype == Dtype::bfloat16) {
    run(&fragments_kernel<Operands::bf16>);
  } else if (dtype == Dtype::float16) {
    run(&fragments_kernel<Operands::f16>);
  } else {
    run(&fragments_kernel<Operands::tf32>);
  }
}

}  // namespace rru::RRU_PLATFORM
