// The maps in eval mode: X_t read, A written for the product, S blended, eq. 5, stored, and pooled into strips, eq. 9.
#pragma once

#include "refine_eval_clip.h"

namespace rru::RRU_PLATFORM {

// S of this CTA's channels. Arrays are registers: loops over them are unrolled.
template <class C>
class EvalBlend {
  using At = EvalMemory<C>;
  static constexpr bool k16Bit = C::k16Bit;
  static constexpr int kWords = k16Bit ? C::kRun / 2 : C::kRun;  // registers of a thread's run of X

 public:
  // Reads the state: of the segment before, of the caller, or X_1.
  DEVICE explicit EvalBlend(const EvalClip<C>& clip) : clip_(clip) {
    for (int i = 0; i < clip_.plan.run_rows; i++) {
      clip_.strip(i) = 0.f;
    }
    if (clip_.a.first == 0) {
      load(clip_.a.has_state ? clip_.a.state : clip_.a.x, 0);
      take_x();
      UNROLL for (int i = 0; i < C::kRun; i++) {
        s_[i] = x(i);
      }
    } else {
      const float* carry = clip_.a.carry + clip_.run_offset(0, 1);
      const int there = clip_.count();
      UNROLL for (int i = 0; i < C::kRun; i++) {
        s_[i] = i < there ? dev::load(carry + i) : 0.f;
      }
    }
  }

  DEVICE void load_x(int t) {
    load(clip_.a.x, t);
  }

  // Makes what was loaded last the current frame.
  DEVICE void take_x() {
    UNROLL for (int i = 0; i < kWords; i++) {
      x_[i] = next_[i];
    }
  }

  // A = X_t - S_{t-1} into the A tile; fp32 as it is, rounded to TF32 when it is multiplied.
  DEVICE void write_difference() {
    const int offset = (clip_.t / 2 * C::kStride + clip_.position) * C::kElement;
    if constexpr (k16Bit) {
      auto* to = shared_at<uint4>(At::kA + offset);
      UNROLL for (int i = 0; i < C::kRun / 8; i++) {
        uint32_t pairs[4];
        UNROLL for (int j = 0; j < 4; j++) {
          const int at = 8 * i + 2 * j;
          pairs[j] = pack_halves<C::kOperands>(x(at) - s_[at], x(at + 1) - s_[at + 1]);
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

  // S_t = S_{t-1} + Z A, eq. 4 and 5.
  DEVICE void blend() {
    const auto* tile = shared_at<float>(At::kA) + clip_.t / 2 * C::kStride + clip_.position;
    UNROLL for (int i = 0; i < C::kRun; i++) {
      const float difference = k16Bit ? x(i) - s_[i] : tile[i];
      const float z = div_(1.f, 1.f + exp_(-clip_.z_c * clip_.z_s()[clip_.position + i]));
      s_[i] += z * difference;
      if (k16Bit && RRU_MUTANT("S is kept in 16 bits")) {
        s_[i] = low_half<C::kOperands>(pack_halves<C::kOperands>(s_[i], 0.f));
      }
    }
  }

  // Writes S_t, and adds it to the strips.
  DEVICE void store_features(int t) {
    const int there = clip_.count();
    store_run(clip_.run_offset(t, clip_.a.frames), there, s_);
    int row = 0, column = clip_.t % 2 * clip_.plan.run_column;
    float sum = 0.f;
    UNROLL for (int i = 0; i < C::kRun; i++) {
      sum += i < there ? s_[i] : 0.f;
      if (++column == clip_.a.width || i == C::kRun - 1) {
        clip_.strip(row) += sum;
        sum = 0.f;
        column = 0;
        row++;
      }
    }
  }

  // Leaves the state, zeros past the clip's length, and the strips.
  DEVICE void finish(int end) {
    const int there = clip_.count();
    if (clip_.a.carry != nullptr) {
      float* carry = clip_.a.carry + clip_.run_offset(0, 1);
      UNROLL for (int i = 0; i < C::kRun; i++) {
        if (i < there) {
          store(carry + i, s_[i]);
        }
      }
    }
    const float zeros[C::kRun] = {};
    for (int t = end > clip_.a.first ? end : clip_.a.first; t < clip_.a.end; t++) {
      store_run(clip_.run_offset(t, clip_.a.frames), there, zeros);
    }
    sync("strips of both threads of a channel are summed");
    const int height = clip_.a.positions / clip_.a.width, begin = C::kRun / clip_.a.width;
    for (int i = clip_.t; i < C::kChannels * height; i += C::kThreads) {
      const int c = i % C::kChannels, row = i / C::kChannels, channel = clip_.rank * C::kChannels + c;
      const auto* own = shared_at<float>(clip_.plan.strips) + c;
      // Of the first thread's run, and of the second's, which begins at row `begin`.
      const int second = row - begin, run_rows = clip_.plan.run_rows;
      float sum = row < run_rows ? own[row * C::kChannels] : 0.f;
      sum += second >= 0 && second < run_rows ? own[(run_rows + second) * C::kChannels] : 0.f;
      if (channel < clip_.a.channels) {
        float* to = clip_.a.strips + (static_cast<int64_t>(clip_.index) * clip_.a.channels + channel) * height + row;
        store(to, clip_.a.first == 0 ? sum : dev::load(to) + sum);
      }
    }
  }

 private:
  // Reads this thread's run of a frame into `next_`, zeros where there is nothing.
  DEVICE void load(const Maps& maps, int t) {
    const int64_t offset = clip_.index * maps.clip + t * maps.frame + clip_.channel * maps.channel;
    const int there = clip_.count();
    if (clip_.plan.vector) {
      const auto* from =
          reinterpret_cast<const uint4*>(static_cast<const char*>(maps.data) + (offset + clip_.position) * C::kElement);
      UNROLL for (int i = 0; i < kWords / 4; i++) {
        const uint4 v = there == 0 ? make_uint4(0, 0, 0, 0) : load_stream(from + i);
        next_[4 * i] = v.x;
        next_[4 * i + 1] = v.y;
        next_[4 * i + 2] = v.z;
        next_[4 * i + 3] = v.w;
      }
    } else if constexpr (k16Bit) {
      const auto* from = static_cast<const unsigned short*>(maps.data) + offset + clip_.position * maps.position;
      UNROLL for (int i = 0; i < kWords; i++) {
        const uint32_t low = 2 * i < there ? load_stream(from + 2 * i * maps.position) : 0;
        const uint32_t high = 2 * i + 1 < there ? load_stream(from + (2 * i + 1) * maps.position) : 0;
        next_[i] = low | high << 16;
      }
    } else {
      const auto* from = static_cast<const float*>(maps.data) + offset + clip_.position * maps.position;
      UNROLL for (int i = 0; i < kWords; i++) {
        next_[i] = i < there ? float_as_uint(load_stream(from + i * maps.position)) : 0;
      }
    }
  }

  DEVICE float x(int i) const {
    if constexpr (k16Bit) {
      return i % 2 == 0 ? low_half<C::kOperands>(x_[i / 2]) : high_half<C::kOperands>(x_[i / 2]);
    } else {
      return uint_as_float(x_[i]);
    }
  }

  DEVICE void store_run(int64_t offset, int there, const float (&v)[C::kRun]) {
    if (clip_.plan.vector) {
      auto* to = reinterpret_cast<uint4*>(static_cast<char*>(clip_.a.features) + offset * C::kElement);
      UNROLL for (int i = 0; i < kWords / 4; i++) {
        uint32_t words[4];
        UNROLL for (int j = 0; j < 4; j++) {
          const int at = 4 * i + j;
          words[j] = k16Bit ? pack_halves<C::kOperands>(v[k16Bit ? 2 * at : 0], v[k16Bit ? 2 * at + 1 : 0])
                            : float_as_uint(v[k16Bit ? 0 : at]);
        }
        if (there > 0) {
          store_stream(to + i, make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    } else if constexpr (k16Bit) {
      auto* to = static_cast<unsigned short*>(clip_.a.features) + offset;
      UNROLL for (int i = 0; i < C::kRun; i++) {
        if (i < there) {
          store_stream(to + i, static_cast<unsigned short>(pack_halves<C::kOperands>(v[i], 0.f)));
        }
      }
    } else {
      auto* to = static_cast<float*>(clip_.a.features) + offset;
      UNROLL for (int i = 0; i < C::kRun; i++) {
        if (i < there) {
          store_stream(to + i, v[i]);
        }
      }
    }
  }

  const EvalClip<C>& clip_;
  uint32_t x_[kWords], next_[kWords];
  float s_[C::kRun];
};

}  // namespace rru::RRU_PLATFORM
