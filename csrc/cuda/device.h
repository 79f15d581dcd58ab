// What a kernel may use: CUDA under nvcc; under another compiler the same on a CPU, see emulation.h.
//
// Inline assembly is here alone. A synchronization is labelled with its purpose, its site, by which tests leave it out.
#pragma once

#ifndef __CUDACC__
#include "emulation.h"
#define RRU_PLATFORM emulated
#else
#define RRU_PLATFORM cuda

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#define DEVICE __device__ __forceinline__
#define RRU_PARAMETER __grid_constant__
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_4 _Pragma("unroll 4")
#define UNROLL_BY_8 _Pragma("unroll 8")
#define NO_UNROLL _Pragma("unroll 1")
#define RRU_GLOBAL(threads) __global__ void __launch_bounds__(threads, 1)
#define RRU_MUTANT(name) false
#if __CUDA_ARCH__ >= 900
#define RRU_HAS_CLUSTERS
#endif

namespace rru::cuda::dev {

DEVICE uint32_t float_as_uint(float v) {
  return __float_as_uint(v);
}
DEVICE float uint_as_float(uint32_t v) {
  return __uint_as_float(v);
}

DEVICE int thread() {
  return threadIdx.x;
}
DEVICE int cta() {
  return blockIdx.x;
}
DEVICE int rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE int cluster_size() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}

// The inboxes' mbarriers come first in shared memory. Swizzled rows after them are aligned to their length.
constexpr int kInboxBytes = 256;

DEVICE unsigned char* smem_base() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
DEVICE unsigned char* smem() {
  return smem_base() + kInboxBytes;
}
DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
DEVICE uint32_t inbox_address(int box) {
  return shared_address(smem_base()) + 8 * box;
}

DEVICE void sync(const char*) {
  __syncthreads();
}

// Drains the CTA's stores to global memory and empties L1: not for the inside of a loop. Not .aligned: lanes may come
// from different branches.
DEVICE void cluster_arrive(const char*) {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
DEVICE void cluster_wait(const char*) {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// By one thread, before a cluster barrier that precedes all pushes.
DEVICE void inbox_init(int count) {
  for (int box = 0; box < count; box++) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(inbox_address(box)) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Sets how many bytes the phase receives. By one thread, once per phase; pushes may be ahead of it.
DEVICE void inbox_arm(int box, int bytes, const char*) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(inbox_address(box)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has received its bytes, which can be read then.
DEVICE void inbox_wait(int box, int parity, const char*) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(inbox_address(box)),
      "r"(parity)
      : "memory");
}
// A CTA of this cluster. Volatile, so that addresses in it are not computed before a loop and kept in registers.
struct Peer {
  uint32_t base;  // of its shared memory
};
DEVICE Peer peer(int rank) {
  Peer p;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(p.base) : "r"(shared_address(smem_base())), "r"(rank));
  return p;
}
// Stores a value at this offset of a CTA's smem(), and counts its bytes in an inbox there.
DEVICE void push(Peer to, int offset, float value, int box) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                   to.base + kInboxBytes + offset),
               "f"(value), "r"(to.base + 8 * box)
               : "memory");
}
DEVICE void push(Peer to, int offset, float2 value, int box) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   to.base + kInboxBytes + offset),
               "f"(value.x), "f"(value.y), "r"(to.base + 8 * box)
               : "memory");
}
DEVICE void inbox_retire(float*, int) {}

// A flag in global memory tells CTAs of other clusters that all that this CTA's threads have stored before its last
// barrier is there: one thread sets it, and those that read, after a barrier, wait for it. A value is never set back.
DEVICE void flag_set(uint32_t* flag, uint32_t value, const char*) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
DEVICE void flag_wait(const uint32_t* flag, uint32_t value, const char*) {
  for (uint32_t polls = 0;; polls++) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
    if (v >= value) {
      return;
    }
    if (polls == 1u << 27) {  // a minute: an error rather than a hang
      asm volatile("trap;");
    }
  }
}

// All lanes of the warp take part.
DEVICE float shfl_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// d (16 x 8) += a (16 x 16) b (16 x 8), fragments as in the PTX ISA.
DEVICE void mma_bf16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
DEVICE void mma_f16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
// d (16 x 8) += a (16 x 8) b (8 x 8). The low 13 bits of an operand may be dropped: to round is the caller's.
DEVICE void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
// Four transposed 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE float bf16_low(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
DEVICE float bf16_high(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
DEVICE float f16_low(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}
DEVICE float f16_high(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE float exp_(float v) {
  return __expf(v);
}
DEVICE float div_(float a, float b) {
  return __fdividef(a, b);
}

// A place in shared memory, by its offset in bytes.
template <class T>
DEVICE T* shared_at(int offset) {
  return reinterpret_cast<T*>(smem() + offset);
}

// Of memory that nobody writes during the launch.
template <class T>
DEVICE T load_const(const T* p) {
  return __ldg(p);
}
// Of memory that is read or written once.
template <class T>
DEVICE T load_stream(const T* p) {
  return __ldcs(p);
}
template <class T>
DEVICE void store_stream(T* p, T v) {
  __stcs(p, v);
}
// Of memory that is written: by this thread, or by others before a barrier or a flag.
template <class T>
DEVICE T load(const T* p) {
  return *p;
}
template <class T>
DEVICE void store(T* p, T v) {
  *p = v;
}

// Brings the 128 bytes of an address into the L2 cache.
DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
// Loads and products stay on their side of it: else the compiler sinks all loads of a loop to its end.
DEVICE void fence_schedule() {
  __syncwarp();
}

// The same number, as if it were another one: addresses of it are computed anew rather than kept in registers.
DEVICE int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Where and how a kernel is launched.
struct Launch {
  int device;      // of the tensors
  void* stream;    // a cudaStream_t
  int ctas;        // a multiple of the cluster's
  int cluster;     // CTAs of a cluster
  int threads;     // of a CTA
  size_t shared;   // bytes of shared memory of a CTA, without the inboxes'
  bool together = false;  // all CTAs at once, or an error: they wait for each other
};

// Raises a CUDA error.
inline void check(const char* call, cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // the next call must not find it
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
  }
}

// Makes a device current, and the one before again. The caller has made it current already, where it can.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check("cudaGetDevice", cudaGetDevice(&before_));
    if (before_ != device_) {
      check("cudaSetDevice", cudaSetDevice(device_));
    }
  }
  ~OnDevice() {
    if (before_ != device_) {
      cudaSetDevice(before_);
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, device_;
};

inline int max_shared(int device) {
  int bytes = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kInboxBytes;
}

// A launch of one cluster, or of all.
class ClusterConfig {
 public:
  ClusterConfig(const Launch& l, int ctas, bool together) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim = {static_cast<unsigned>(l.cluster), 1, 1};
    attributes_[1].id = cudaLaunchAttributeCooperative;
    attributes_[1].val.cooperative = 1;
    config_.gridDim = dim3(ctas);
    config_.blockDim = dim3(l.threads);
    config_.dynamicSmemBytes = l.shared + kInboxBytes;
    config_.stream = static_cast<cudaStream_t>(l.stream);
    config_.attrs = attributes_;
    config_.numAttrs = together ? 2 : 1;
  }
  ClusterConfig(const ClusterConfig&) = delete;
  ClusterConfig& operator=(const ClusterConfig&) = delete;
  const cudaLaunchConfig_t* get() const {
    return &config_;
  }

 private:
  cudaLaunchAttribute attributes_[2]{};
  cudaLaunchConfig_t config_{};
};

// Returns the clusters that can be on the chip at once; 0 with the reason if none can. Asks once, and allows the kernel
// all of the chip's shared memory, whatever this launch takes, and clusters of more than 8. Raises CUDA's errors.
template <class Arguments>
inline int max_clusters(void (*kernel)(Arguments), const Launch& l, std::string* reason) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto* function = reinterpret_cast<const void*>(kernel);
  const std::tuple<const void*, int, int, size_t> key{function, l.device, l.cluster, l.shared};
  if (known.count(key) == 0) {
    const OnDevice guard(l.device);
    cudaFuncAttributes attributes{};
    check("cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, function));
    int clusters = 0;
    if (attributes.ptxVersion >= 90) {  // else the kernel is empty
      const int most = max_shared(l.device) + kInboxBytes;
      check(
          "cudaFuncSetAttribute", cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      check("cudaFuncSetAttribute", cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      const ClusterConfig config(l, l.cluster, false);
      const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, function, config.get());
      if (status == cudaErrorInvalidClusterSize) {  // on a part of a GPU
        clusters = 0;
        cudaGetLastError();
      } else {
        check("cudaOccupancyMaxActiveClusters", status);
      }
    }
    known[key] = clusters;
  }
  if (known[key] == 0) {
    *reason = "no cluster of " + std::to_string(l.cluster) + " CTAs with " + std::to_string(l.shared + kInboxBytes) +
        " bytes of shared memory each fits on this GPU";
  }
  return known[key];
}

// Launches a kernel that max_clusters has allowed what it needs. Raises CUDA's errors.
template <class Arguments>
inline void launch(void (*kernel)(Arguments), const Launch& l, const Arguments& arguments) {
  const OnDevice guard(l.device);
  const ClusterConfig config(l, l.ctas, l.together);
  check("cudaLaunchKernelEx", cudaLaunchKernelEx(config.get(), kernel, arguments));
}

}  // namespace rru::cuda::dev
#endif
