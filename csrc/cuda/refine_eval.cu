// refine in eval mode, eq. 1-5 and 9, all frames in one launch: a clip per cluster, its state on chip.
//
// CTA `rank` of a cluster has kChannels channels: its S in registers, its columns of W in shared memory and registers.
// Per frame it multiplies them with A = X - S into a part of U, all D rows; pushes the rows to the CTAs that own them,
// which add the parts in the order of ranks, normalize and pool; and the pooled sums come back to all. Every CTA then
// computes z_s, and z_c of its own channels, and blends.

#include <bit>
#include <stdexcept>

#include "refine_layout.h"

namespace rru::RRU_PLATFORM {

namespace {

// What follows from a call's sizes. Kernels read it from constant memory: none of it takes a register.
struct Plan {
  PackedLayout layout;
  int log2_ctas, log2_rows;  // of a cluster; of U's rows that a CTA owns
  int run_rows;              // rows of strips that a thread's run of positions touches, at most
  int run_column;            // column of a second thread's first position
  int strips;                // offset in shared memory
  float per_position, per_d;
  bool vector;               // X is read, and S written, 16 bytes at a time
  bool w_c_shared;           // w_c is kept in shared memory, else read from L2 at every frame
};

struct Call {
  RefineEval a;
  Plan plan;
};

// Inboxes: parts of U for this CTA's rows, and pooled sums from all CTAs.
constexpr int kU = 0, kV = 1;

// Shared memory, offsets in bytes. After it come w_c, if it is shared, and the strips.
template <class C>
struct Shared {
  static constexpr int kW = 0;
  static constexpr int kA = kW + 16 * C::kSlicesShared * C::kSliceUnits;
  static constexpr int kInboxU = kA + C::kChannels * C::kStride * C::kElement;
  static constexpr int kInboxV = kInboxU + 4 * C::kD * C::kP;
  static constexpr int kVectors = kInboxV + 4 * (kMaxCluster * C::kP + C::kD);
  static_assert(kInboxU % (4 * C::kP) == 0);
  static constexpr int kWc = kVectors + 4 * (2 * C::kP + C::kD + C::kAttn + C::kThreads / 32 * C::kP);
};

DEVICE float relu(float v) {
  return v < 0.f ? 0.f : v;  // NaN stays
}

// One CTA's part of a clip. Arrays are registers: loops over them are unrolled.
template <Operands OPERANDS, int WARPS, int TILES>
class Refiner {
  using C = Cut<OPERANDS, WARPS, TILES>;
  using At = Shared<C>;
  static constexpr bool k16Bit = C::k16Bit;
  static constexpr int kWords = k16Bit ? C::kRun / 2 : C::kRun;  // registers of a thread's run of X
  static constexpr int kGroups = 2 * TILES;                      // lanes that share a row of U, 4 positions each
  static constexpr int kRowsPerPass = C::kThreads / kGroups;

 public:
  DEVICE explicit Refiner(const Call& call)
      : a_(call.a),
        plan_(call.plan),
        t_(thread()),
        lane_(t_ % 32),
        warp_(t_ / 32),
        rank_(rank()),
        clip_(cta() >> plan_.log2_ctas),
        channel_(rank_ * C::kChannels + t_ / 2),
        position_(t_ % 2 * C::kRun) {}

  DEVICE void run() {
    const int length = a_.lengths == nullptr ? a_.frames : static_cast<int>(load_const(a_.lengths + clip_));
    const int end = length < a_.end ? length : a_.end;
    begin();
    const int gated = a_.first == 0 && !a_.has_state ? 1 : a_.first;  // the first frame with a gate
    if (gated > a_.first && end > 0) {
      store_features(0);
    }
    if (gated < end) {
      load_x(gated);
    }
    for (int t = gated; t < end; t++) {
      take_x();
      write_difference();
      sync("the A tile is written");
      multiply();
      const int step = t - gated;
      receive(t, step & 1, t + 1 < end);
      attend(t);
      blend();
      store_features(t);
    }
    finish(end);
  }

 private:
  DEVICE int ctas() const {
    return 1 << plan_.log2_ctas;
  }
  DEVICE int rows() const {
    return 1 << plan_.log2_rows;
  }

  DEVICE const uint4* packed(int offset) const {
    return static_cast<const uint4*>(a_.packed) + offset;
  }

  // Positions of this thread's run that there are; 0 for a channel that is not there.
  DEVICE int count() const {
    const int left = a_.positions - position_;
    return channel_ >= a_.channels || left < 0 ? 0 : left < C::kRun ? left : C::kRun;
  }

  DEVICE void begin() {
    if (t_ == 0) {
      inbox_init(2);
    }
    const uint4* w = packed(plan_.layout.w) + rank_ * C::kSlices * C::kSliceUnits;
    UNROLL for (int k = 0; k < C::kSlicesFirst && !C::kFma; k++) {
      UNROLL for (int m = 0; m < 2; m++) {
        w_[k][m] = load_const(w + (k * 2 * WARPS + 2 * warp_ + m) * 32 + lane_);
      }
    }
    for (int i = t_; i < C::kSlicesShared * C::kSliceUnits; i += C::kThreads) {
      shared_at<uint4>(At::kW)[i] = load_const(w + C::kSlicesFirst * C::kSliceUnits + i);
    }
    if (plan_.w_c_shared) {
      for (int i = t_; i < plan_.layout.w_c_units; i += C::kThreads) {
        shared_at<uint4>(At::kWc)[i] = load_const(packed(plan_.layout.w_c) + rank_ * plan_.layout.w_c_units + i);
      }
    }
    for (int i = 0; i < plan_.run_rows; i++) {
      strip(i) = 0.f;
    }
    for (int p = t_; p < C::kP; p += C::kThreads) {
      z_s()[p] = 1.f;  // without spatial attention
    }
    if (a_.first == 0) {
      load(a_.has_state ? a_.state : a_.x, 0);
      take_x();
      UNROLL for (int i = 0; i < C::kRun; i++) {
        s_[i] = x(i);
      }
    } else {
      const float* carry = a_.carry + carry_offset();
      const int there = count();
      UNROLL for (int i = 0; i < C::kRun; i++) {
        s_[i] = i < there ? dev::load(carry + i) : 0.f;
      }
    }
    cluster_arrive("inboxes are initialized");
    cluster_wait("inboxes are initialized");
  }

  DEVICE int64_t carry_offset() const {
    return (static_cast<int64_t>(clip_) * a_.channels + channel_) * a_.positions + position_;
  }

  DEVICE void load_x(int t) {
    load(a_.x, t);
  }

  // Reads this thread's run of a frame into `next_`, zeros where there is nothing.
  DEVICE void load(const Maps& maps, int t) {
    const int64_t offset = clip_ * maps.clip + t * maps.frame + channel_ * maps.channel;
    const int there = count();
    if (plan_.vector) {
      const auto* from =
          reinterpret_cast<const uint4*>(static_cast<const char*>(maps.data) + (offset + position_) * C::kElement);
      UNROLL for (int i = 0; i < kWords / 4; i++) {
        const uint4 v = there == 0 ? make_uint4(0, 0, 0, 0) : load_stream(from + i);
        next_[4 * i] = v.x;
        next_[4 * i + 1] = v.y;
        next_[4 * i + 2] = v.z;
        next_[4 * i + 3] = v.w;
      }
    } else if constexpr (k16Bit) {
      const auto* from = static_cast<const unsigned short*>(maps.data) + offset + position_ * maps.position;
      UNROLL for (int i = 0; i < kWords; i++) {
        const uint32_t low = 2 * i < there ? load_stream(from + 2 * i * maps.position) : 0;
        const uint32_t high = 2 * i + 1 < there ? load_stream(from + (2 * i + 1) * maps.position) : 0;
        next_[i] = low | high << 16;
      }
    } else {
      const auto* from = static_cast<const float*>(maps.data) + offset + position_ * maps.position;
      UNROLL for (int i = 0; i < kWords; i++) {
        next_[i] = i < there ? float_as_uint(load_stream(from + i * maps.position)) : 0;
      }
    }
  }

  // Makes what was loaded last the current frame.
  DEVICE void take_x() {
    UNROLL for (int i = 0; i < kWords; i++) {
      x_[i] = next_[i];
    }
  }

  DEVICE float x(int i) const {
    if constexpr (k16Bit) {
      return i % 2 == 0 ? low_half<OPERANDS>(x_[i / 2]) : high_half<OPERANDS>(x_[i / 2]);
    } else {
      return uint_as_float(x_[i]);
    }
  }

  // A = X_t - S_{t-1} into the A tile; fp32 as it is, rounded to TF32 when it is multiplied.
  DEVICE void write_difference() {
    const int offset = (t_ / 2 * C::kStride + position_) * C::kElement;
    if constexpr (k16Bit) {
      auto* to = shared_at<uint4>(At::kA + offset);
      UNROLL for (int i = 0; i < C::kRun / 8; i++) {
        uint32_t pairs[4];
        UNROLL for (int j = 0; j < 4; j++) {
          const int at = 8 * i + 2 * j;
          pairs[j] = pack_halves<OPERANDS>(x(at) - s_[at], x(at + 1) - s_[at + 1]);
        }
        to[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    } else {
      auto* to = shared_at<float4>(At::kA + offset);
      UNROLL for (int i = 0; i < C::kRun / 4; i++) {
        to[i] = make_float4(
            quiet(x(4 * i) - s_[4 * i]), quiet(x(4 * i + 1) - s_[4 * i + 1]), quiet(x(4 * i + 2) - s_[4 * i + 2]),
            quiet(x(4 * i + 3) - s_[4 * i + 3]));
      }
    }
  }

  // Pushes rows [32 warp, + 32) of this CTA's part of U = W A to their owners, half of the positions after the other.
  DEVICE void multiply() {
    constexpr int kTiles = TILES / 2;
    UNROLL for (int half = 0; half < 2; half++) {
      float part[2][kTiles][4] = {};
      if constexpr (C::kFma) {
        const uint4* w = packed(plan_.layout.w) + rank_ * C::kSlices * C::kSliceUnits;
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
              w[m] = shared_at<uint4>(At::kW)[((k - C::kSlicesFirst) * 2 * WARPS + 2 * warp_ + m) * 32 + lane_];
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
    if (t_ == 0) {
      inbox_arm(kU, C::kD * ((a_.positions + 7) / 8 * 8) * 4, "parts of U are expected");
    }
  }

  DEVICE void multiply_slice(float (&part)[2][TILES / 2][4], const uint4 (&w)[2], int k, int half) {
    constexpr int kTiles = TILES / 2;
    if constexpr (k16Bit) {
      UNROLL for (int tile = 0; tile < kTiles; tile += 2) {
        const int row = k * 16 + lane_ % 16, column = half * C::kRun + tile * 8 + lane_ / 16 * 8;
        uint32_t b[4];
        ldmatrix_x4_trans(b, smem() + At::kA + (row * C::kStride + column) * 2);
        UNROLL for (int m = 0; m < 2; m++) {
          multiply_16_bit(part[m][tile], w[m], b[0], b[1]);
          multiply_16_bit(part[m][tile + 1], w[m], b[2], b[3]);
        }
      }
    } else {
      UNROLL for (int tile = 0; tile < kTiles; tile++) {
        const auto* from =
            shared_at<uint32_t>(At::kA) + (k * 8 + lane_ % 4) * C::kStride + half * C::kRun + tile * 8 + lane_ / 4;
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
          const uint4 v = w(quarter * C::kD + 32 * warp_ + 16 * m + 8 * i + lane_ / 4);
          rows[m][i][0] = uint_as_float(v.x);
          rows[m][i][1] = uint_as_float(v.y);
          rows[m][i][2] = uint_as_float(v.z);
          rows[m][i][3] = uint_as_float(v.w);
        }
      }
      UNROLL for (int c = 0; c < 4; c++) {
        const float* row = shared_at<float>(At::kA) + (8 * k + 4 * quarter + c) * C::kStride;
        const float* from = row + half * C::kRun + lane_ % 4 * 2;
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

  // Offset of 2 or 4 positions of a row that this CTA owns, in a source's part of U. Swizzled by tiles of 8 positions,
  // so that neither pushes nor reads conflict on banks.
  DEVICE int inbox_u(int source, int own_row, int p) const {
    return At::kInboxU + 4 * (((source << plan_.log2_rows) + own_row) * C::kP + (p ^ own_row % TILES * 8));
  }

  // Pushes one row per four lanes: elements FIRST and FIRST + 1 of the tiles' fragments.
  template <int FIRST>
  DEVICE void push_rows(int row_of_warp, int half, const float (&part)[TILES / 2][4]) {
    const int row = 32 * warp_ + row_of_warp + lane_ / 4;
    const Peer owner = peer(row >> plan_.log2_rows);
    const int offset = inbox_u(rank_, row & (rows() - 1), lane_ % 4 * 2);
    UNROLL for (int i = 0; i < TILES / 2; i++) {
      const int tile = half * (TILES / 2) + i;
      if (8 * tile < a_.positions) {  // by exclusive or: a tile's 32 bytes are aligned
        push(owner, offset ^ 32 * tile, float2{part[i][FIRST], part[i][FIRST + 1]}, kU);
      }
    }
  }

  DEVICE int inbox_v(int source) const {
    return At::kInboxV + 4 * source * (C::kP + rows());
  }
  DEVICE float* pooled() const {  // (kP,) mean of Y over gate channels
    return shared_at<float>(At::kVectors);
  }
  DEVICE float* means() const {  // (kD,) mean of Y over positions
    return pooled() + C::kP;
  }
  DEVICE float* hidden() const {  // (kAttn,)
    return means() + C::kD;
  }
  DEVICE float* z_s() const {  // (kP,)
    return hidden() + C::kAttn;
  }
  DEVICE float* partials() const {  // (WARPS, kP) sums of Y over a warp's rows
    return z_s() + C::kP;
  }
  DEVICE float& strip(int run_row) const {
    return shared_at<float>(plan_.strips)[(t_ % 2 * plan_.run_rows + run_row) * C::kChannels + t_ / 2];
  }

  DEVICE int64_t u_offset(int t, int row, int p) const {
    return ((static_cast<int64_t>(t - a_.u_first) * a_.clips + clip_) * a_.d + row) * a_.positions + p;
  }

  // What 4 positions from p of an own row begin with: W_m M_t, and the row's norm.
  struct Row {
    float u[4];
    float scale, shift;
  };

  DEVICE bool has_row(int own) const {
    return own < rows() && rank_ * rows() + own < a_.d;
  }

  DEVICE Row read_row(int t, int own, int p) const {
    const int row = rank_ * rows() + own;
    Row r{};
    if (has_row(own)) {
      const auto* norm = reinterpret_cast<const float*>(packed(plan_.layout.norm));
      r.scale = load_const(norm + row);
      r.shift = load_const(norm + C::kD + row);
      if (a_.u != nullptr) {
        const float* from = a_.u + u_offset(t, row, p);
        UNROLL for (int i = 0; i < 4; i++) {
          r.u[i] = p + i < a_.positions ? dev::load(from + i) : 0.f;
        }
      }
    }
    return r;
  }

  // Adds up this CTA's rows of U, normalizes and pools them, and receives the pooled sums of all rows.
  DEVICE void receive(int t, int parity, bool has_next) {
    const int group = t_ % kGroups, p = 4 * group;
    // All that the wait for U can hide.
    Row r = read_row(t, t_ / kGroups, p);
    if (a_.spatial) {
      UNROLL for (int i = 0; i < C::kWs1; i++) {
        w_s1_[i] = load_const(packed(plan_.layout.w_s1) + i * C::kThreads + t_);
      }
      UNROLL for (int i = 0; i < C::kWs2; i++) {
        w_s2_[i] = load_const(packed(plan_.layout.w_s2) + i * C::kThreads + t_);
      }
    }
    if (has_next) {
      load_x(t + 1);
    }
    inbox_wait(kU, parity, "parts of U have arrived");
    float4 sums = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int first = 0; first < rows(); first += kRowsPerPass) {
      const int own = first + t_ / kGroups;
      if (first > 0) {
        r = read_row(t, own, p);
      }
      const float4 y = has_row(own) ? activate(t, own, p, r) : make_float4(0.f, 0.f, 0.f, 0.f);
      drop(own, p);
      float mean = (y.x + y.y) + (y.z + y.w);
      UNROLL for (int mask = kGroups / 2; mask > 0; mask /= 2) {
        mean += shfl_xor(mean, mask);
      }
      if (own < rows()) {
        for (int to = group; to < ctas(); to += kGroups) {
          push(peer(to), inbox_v(rank_) + 4 * (C::kP + own), mean * plan_.per_position, kV);
        }
      }
      sums = make_float4(sums.x + y.x, sums.y + y.y, sums.z + y.z, sums.w + y.w);
    }
    UNROLL for (int mask = kGroups; mask < 32; mask *= 2) {
      sums = make_float4(
          sums.x + shfl_xor(sums.x, mask), sums.y + shfl_xor(sums.y, mask), sums.z + shfl_xor(sums.z, mask),
          sums.w + shfl_xor(sums.w, mask));
    }
    if (lane_ < kGroups) {
      reinterpret_cast<float4*>(partials() + warp_ * C::kP)[group] = sums;
    }
    sync("U is read, and the sums of each warp are written");
    for (int i = t_; i < C::kP * ctas(); i += C::kThreads) {
      const int position = i % C::kP;
      float sum = 0.f;
      UNROLL for (int warp = 0; warp < WARPS; warp++) {
        sum += partials()[warp * C::kP + position];
      }
      push(peer(i / C::kP), inbox_v(rank_) + 4 * position, sum, kV);
    }
    if (t_ == 0) {
      inbox_arm(kV, 4 * (ctas() * C::kP + C::kD), "pooled sums are expected");
    }
    inbox_wait(kV, parity, "pooled sums have arrived");
  }

  // Y of 4 positions of a row, 0 past the last one.
  DEVICE float4 activate(int t, int own, int p, const Row& r) {
    float4 u = make_float4(r.u[0], r.u[1], r.u[2], r.u[3]);
    const int sources = p < a_.positions ? ctas() : 0;  // positions past the last tile are not pushed
    UNROLL_BY_4 for (int source = 0; source < sources; source++) {
      const float4 part = *shared_at<float4>(inbox_u(source, own, p));
      u = make_float4(u.x + part.x, u.y + part.y, u.z + part.z, u.w + part.w);
    }
    float values[4] = {u.x, u.y, u.z, u.w};
    UNROLL for (int i = 0; i < 4; i++) {
      const bool is_there = p + i < a_.positions;
      if (is_there && a_.u_out != nullptr) {
        store(a_.u_out + u_offset(t, rank_ * rows() + own, p) + i, values[i]);
      }
      const bool counts = is_there || RRU_MUTANT("positions past the last are pooled");
      values[i] = counts ? relu(values[i] * r.scale + r.shift) : 0.f;
    }
    return make_float4(values[0], values[1], values[2], values[3]);
  }

  // 4 positions of an own row, in all parts of U, have been read or do not count.
  DEVICE void drop(int own, int p) {
    for (int source = 0; source < ctas() && own < rows(); source++) {
      inbox_retire(shared_at<float>(inbox_u(source, own, p)), 4);
    }
  }

  // The attention vectors, eq. 2 and 3, of pooled sums.
  DEVICE void attend(int t) {
    for (int p = t_; p < C::kP; p += C::kThreads) {
      float sum = 0.f;
      for (int i = 0; i < ctas(); i++) {
        const int source = RRU_MUTANT("sums begin at the own rank") ? (rank_ + i) & (ctas() - 1) : i;
        float* from = shared_at<float>(inbox_v(source)) + p;
        sum += *from;
        inbox_retire(from, 1);
      }
      pooled()[p] = sum * plan_.per_d;
    }
    // kD = kThreads
    float* from = shared_at<float>(inbox_v(t_ >> plan_.log2_rows)) + C::kP + (t_ & (rows() - 1));
    means()[t_] = *from;
    inbox_retire(from, 1);
    sync("pooled means are written");
    const int64_t step = static_cast<int64_t>(t - (a_.has_state ? 0 : 1)) * a_.clips + clip_;
    if (a_.spatial) {
      const auto* half = reinterpret_cast<const float4*>(pooled() + position_);
      float sum = 0.f;
      UNROLL for (int i = 0; i < C::kWs1; i++) {
        sum += dot(w_s1_[i], half[i]);
      }
      sum = relu(sum + shfl_xor(sum, 1));
      if (t_ % 2 == 0) {
        hidden()[t_ / 2] = sum;
        if (a_.h != nullptr && rank_ == 0 && t_ / 2 < a_.num_attn) {
          store(a_.h + step * a_.num_attn + t_ / 2, sum);
        }
      }
    }
    z_c_ = 1.f;
    if (a_.channel) {
      const float half = plan_.layout.w_c_is_float ? channel_logit<true>() : channel_logit<false>();
      z_c_ = half + shfl_xor(half, 1);
      if (a_.z_c != nullptr && t_ % 2 == 0 && channel_ < a_.channels) {
        store(a_.z_c + step * a_.channels + channel_, z_c_);
      }
    }
    sync("h is written");
    if (a_.spatial) {
      const auto* quarter = reinterpret_cast<const float4*>(hidden() + t_ % 4 * C::kAttn / 4);
      UNROLL for (int pass = 0; pass < C::kPasses; pass++) {
        const int p = pass * 8 * WARPS + t_ / 4;
        float sum = 0.f;
        UNROLL for (int i = 0; i < WARPS; i++) {
          sum += dot(w_s2_[pass * WARPS + i], quarter[i]);
        }
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
        if (t_ % 4 == 0 && p < C::kP) {
          z_s()[p] = sum;
          if (a_.z_s != nullptr && rank_ == 0 && p < a_.positions) {
            store(a_.z_s + step * a_.positions + p, sum);
          }
        }
      }
    }
    sync("z_s is written");
  }

  DEVICE static float dot(const uint4& w, const float4& v) {
    return uint_as_float(w.x) * v.x + uint_as_float(w.y) * v.y + uint_as_float(w.z) * v.z + uint_as_float(w.w) * v.w;
  }

  // Half of the sum over gate channels of w_c times the means, for this thread's channel.
  template <bool FLOAT>
  DEVICE float channel_logit() const {
    const float* mean = means() + t_ % 2 * (C::kD / 2);
    const uint4* from = packed(plan_.layout.w_c) + rank_ * plan_.layout.w_c_units + t_;
    const uint4* own = shared_at<uint4>(At::kWc) + t_;
    constexpr int kPerUnit = FLOAT ? 4 : 8;
    float sum = 0.f;
    UNROLL_BY_4 for (int i = 0; i < C::kD / 2 / kPerUnit; i++) {
      const uint4 w = plan_.w_c_shared ? own[i * C::kThreads] : load_const(from + i * C::kThreads);
      const auto* v = reinterpret_cast<const float4*>(mean + kPerUnit * i);
      if constexpr (FLOAT) {
        sum += dot(w, v[0]);
      } else {
        const float4 first = v[0], second = v[1];
        sum += low_half<OPERANDS>(w.x) * first.x + high_half<OPERANDS>(w.x) * first.y;
        sum += low_half<OPERANDS>(w.y) * first.z + high_half<OPERANDS>(w.y) * first.w;
        sum += low_half<OPERANDS>(w.z) * second.x + high_half<OPERANDS>(w.z) * second.y;
        sum += low_half<OPERANDS>(w.w) * second.z + high_half<OPERANDS>(w.w) * second.w;
      }
    }
    return sum;
  }

  // S_t = S_{t-1} + Z A, eq. 4 and 5.
  DEVICE void blend() {
    const auto* tile = shared_at<float>(At::kA) + t_ / 2 * C::kStride + position_;
    UNROLL for (int i = 0; i < C::kRun; i++) {
      const float difference = k16Bit ? x(i) - s_[i] : tile[i];
      const float z = div_(1.f, 1.f + exp_(-z_c_ * z_s()[position_ + i]));
      s_[i] += z * difference;
      if (k16Bit && RRU_MUTANT("S is kept in 16 bits")) {
        s_[i] = low_half<OPERANDS>(pack_halves<OPERANDS>(s_[i], 0.f));
      }
    }
  }

  // Writes S_t, and adds it to the strips.
  DEVICE void store_features(int t) {
    const int there = count();
    const int64_t offset =
        ((static_cast<int64_t>(clip_) * a_.frames + t) * a_.channels + channel_) * a_.positions + position_;
    store_run(offset, there, s_);
    int row = 0, column = t_ % 2 * plan_.run_column;
    float sum = 0.f;
    UNROLL for (int i = 0; i < C::kRun; i++) {
      sum += i < there ? s_[i] : 0.f;
      if (++column == a_.width || i == C::kRun - 1) {
        strip(row) += sum;
        sum = 0.f;
        column = 0;
        row++;
      }
    }
  }

  DEVICE void store_run(int64_t offset, int there, const float (&v)[C::kRun]) {
    if (plan_.vector) {
      auto* to = reinterpret_cast<uint4*>(static_cast<char*>(a_.features) + offset * C::kElement);
      UNROLL for (int i = 0; i < kWords / 4; i++) {
        uint32_t words[4];
        UNROLL for (int j = 0; j < 4; j++) {
          const int at = 4 * i + j;
          words[j] = k16Bit ? pack_halves<OPERANDS>(v[k16Bit ? 2 * at : 0], v[k16Bit ? 2 * at + 1 : 0])
                            : float_as_uint(v[k16Bit ? 0 : at]);
        }
        if (there > 0) {
          store_stream(to + i, make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    } else if constexpr (k16Bit) {
      auto* to = static_cast<unsigned short*>(a_.features) + offset;
      UNROLL for (int i = 0; i < C::kRun; i++) {
        if (i < there) {
          store_stream(to + i, static_cast<unsigned short>(pack_halves<OPERANDS>(v[i], 0.f)));
        }
      }
    } else {
      auto* to = static_cast<float*>(a_.features) + offset;
      UNROLL for (int i = 0; i < C::kRun; i++) {
        if (i < there) {
          store_stream(to + i, v[i]);
        }
      }
    }
  }

  // Leaves the state, zeros past the clip's length, and the strips.
  DEVICE void finish(int end) {
    const int there = count();
    if (a_.carry != nullptr) {
      float* carry = a_.carry + carry_offset();
      UNROLL for (int i = 0; i < C::kRun; i++) {
        if (i < there) {
          store(carry + i, s_[i]);
        }
      }
    }
    const float zeros[C::kRun] = {};
    for (int t = end > a_.first ? end : a_.first; t < a_.end; t++) {
      store_run(((static_cast<int64_t>(clip_) * a_.frames + t) * a_.channels + channel_) * a_.positions + position_,
                there, zeros);
    }
    sync("strips of both threads of a channel are summed");
    const int height = a_.positions / a_.width, begin = C::kRun / a_.width;
    for (int i = t_; i < C::kChannels * height; i += C::kThreads) {
      const int c = i % C::kChannels, row = i / C::kChannels, channel = rank_ * C::kChannels + c;
      const auto* own = shared_at<float>(plan_.strips) + c;
      float sum = row < plan_.run_rows ? own[row * C::kChannels] : 0.f;
      sum += row >= begin && row - begin < plan_.run_rows ? own[(plan_.run_rows + row - begin) * C::kChannels] : 0.f;
      if (channel < a_.channels) {
        float* to = a_.strips + (static_cast<int64_t>(clip_) * a_.channels + channel) * height + row;
        store(to, a_.first == 0 ? sum : dev::load(to) + sum);
      }
    }
  }

  const RefineEval& a_;
  const Plan& plan_;
  const int t_, lane_, warp_, rank_, clip_, channel_, position_;
  uint4 w_[C::kSlicesFirst][2];
  uint32_t x_[kWords], next_[kWords];
  float s_[C::kRun];
  uint4 w_s1_[C::kWs1], w_s2_[C::kWs2];
  float z_c_;
};

template <Operands OPERANDS, int WARPS, int TILES>
RRU_GLOBAL(32 * WARPS) refine_eval_kernel(const RRU_PARAMETER Call call) {
#ifdef RRU_HAS_CLUSTERS
  Refiner<OPERANDS, WARPS, TILES>(call).run();
#endif
}

bool is_vector(const Maps& maps, int positions, int at_once, int element) {
  const auto fits = [&](int64_t stride) { return stride * element % 16 == 0; };
  return maps.data == nullptr ||
      (maps.position == 1 && positions == at_once && fits(maps.clip) && fits(maps.frame) && fits(maps.channel) &&
       reinterpret_cast<uintptr_t>(maps.data) % 16 == 0);
}

// Sets the plan of a call and how it is launched.
template <class C>
void make_plan(Call& call, Launch& l) {
  const RefineEval& a = call.a;
  const int n = ctas_of(a.channels, C::kChannels);
  Plan& p = call.plan;
  p.layout = packed_layout<C>(a.channels, a.w_c == Dtype::float32);
  p.log2_ctas = std::countr_zero(static_cast<unsigned>(n));
  p.log2_rows = std::countr_zero(static_cast<unsigned>(C::kD / n));
  p.run_rows = (C::kRun - 1) / a.width + 2;
  p.run_column = C::kRun % a.width;
  p.per_position = 1 / static_cast<float>(a.positions);
  p.per_d = 1 / static_cast<float>(a.d);
  p.vector = is_vector(a.x, a.positions, C::kP, C::kElement) && is_vector(a.state, a.positions, C::kP, C::kElement);
  const int strips = 4 * 2 * p.run_rows * C::kChannels, w_c = 16 * p.layout.w_c_units;
  p.w_c_shared = C::k16Bit && a.channel && Shared<C>::kWc + w_c + strips <= max_shared(l.device);
  p.strips = Shared<C>::kWc + (p.w_c_shared ? w_c : 0);
  l = {l.device, l.stream, n * a.clips, n, C::kThreads, static_cast<size_t>(p.strips + strips)};
}

std::string over(const char* name, int value, int limit) {
  return value <= limit ? "" : name + (" of " + std::to_string(value)) + ", at most " + std::to_string(limit);
}

// Calls `f` with a kernel, its launch and its arguments, if these sizes are carried; returns the reason if not, or "".
template <class F>
std::string with_kernel(const RefineEval& a, int device, void* stream, F f) {
  for (const std::string& reason :
       {over("C", a.channels, kMaxChannels), over("H * W", a.positions, kMaxPositions), over("D", a.d, kMaxD),
        over("A", a.num_attn, kMaxAttn)}) {
    if (!reason.empty()) {
      return reason;
    }
  }
  return with_cut(shape_of(a), [&]<Operands O, int WARPS, int TILES>() -> std::string {
    Call call{a, {}};
    Launch l{device, stream, 0, 0, 0, 0};
    make_plan<Cut<O, WARPS, TILES>>(call, l);
    if (l.shared > static_cast<size_t>(max_shared(device))) {
      return over("shared memory", static_cast<int>(l.shared), max_shared(device));
    }
    std::string reason;
    if (max_clusters(&refine_eval_kernel<O, WARPS, TILES>, l, &reason) > 0) {
      f(&refine_eval_kernel<O, WARPS, TILES>, l, call);
    }
    return reason;
  });
}

}  // namespace

std::string refine_eval_lacks(const RefineEval& arguments, int device, ClusterLaunch* launch) {
  return with_kernel(arguments, device, nullptr, [&](auto, const Launch& l, const Call&) {
    *launch = {l.cluster, l.threads, l.shared + kInboxBytes};
  });
}

void refine_eval(const RefineEval& arguments, int device, void* stream) {
  const std::string lacks = with_kernel(
      arguments, device, stream, [](auto kernel, const Launch& l, const Call& call) { launch(kernel, l, call); });
  if (!lacks.empty()) {
    throw std::runtime_error(lacks);
  }
}

}  // namespace rru::RRU_PLATFORM
