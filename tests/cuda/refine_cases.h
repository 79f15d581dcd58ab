// Calls of refine in eval mode, by name.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulation.h"
#include "cuda/kernels.h"

using namespace rru;
namespace dev = rru::emulated::dev;

enum class Layout { contiguous, channels_last, odd };

struct Case {
  int clips = 2, frames = 4, channels = 32, height = 4, width = 2, d = 32, num_attn = 8;
  Dtype dtype = Dtype::float32;
  Float32 float32 = Float32::tf32x3;
  bool spatial = true, channel = true, motion = true, state = false, ragged = false, float_w_c = false;
  Layout layout = Layout::contiguous, state_layout = Layout::contiguous;
  int split = 0;         // frames of a first launch, whose state the second one takes over
  double gate = 1;       // scale of the attention weights
  bool twins = false;    // the second half of the channels equals the first, in maps and weights
};

using Cases = std::map<std::string, Case>;

inline const Cases& cases() {
  static const Cases all = [] {
    Cases c;
    const std::map<std::string, std::pair<Dtype, Float32>> operands{
        {"bf16", {Dtype::bfloat16, Float32::tf32}},
        {"f16", {Dtype::float16, Float32::tf32}},
        {"tf32", {Dtype::float32, Float32::tf32}},
        {"tf32x3", {Dtype::float32, Float32::tf32x3}},
        {"fp32", {Dtype::float32, Float32::ieee}}};
    for (const auto& [name, of] : operands) {
      const auto add = [&, of = of](const std::string& suffix, Case base) {
        base.dtype = of.first;
        base.float32 = of.second;
        c[name + " " + suffix] = base;
      };
      add("plain", {});
      add("tail", {.clips = 1, .frames = 3, .channels = 27, .height = 4, .width = 3, .d = 29, .num_attn = 5});
      add("four CTAs", {.clips = 1, .frames = 3, .channels = 64, .height = 8, .width = 8, .num_attn = 16});
      add("two warps", {.clips = 1, .frames = 3, .channels = 59, .height = 8, .width = 8, .d = 64, .num_attn = 32});
      add("two warps, eight CTAs", {.clips = 1, .frames = 3, .channels = 256, .d = 60, .num_attn = 30});
      add("sixteen CTAs", {.clips = 1, .frames = 3, .channels = 250, .height = 5, .width = 2, .d = 30});
      add("one CTA", {.clips = 3, .frames = 2, .channels = 16, .height = 8, .width = 2});
      add("one frame", {.frames = 1});
      add("spatial", {.channel = false});
      add("channel", {.spatial = false});
      add("appearance", {.motion = false});
      add("state", {.state = true, .state_layout = Layout::odd});
      add("ragged", {.clips = 3, .frames = 5, .ragged = true});
      add("ragged state split", {.clips = 3, .frames = 5, .state = true, .ragged = true, .split = 2});
      add("split", {.frames = 5, .split = 2});
      add("split after one", {.frames = 5, .split = 1});
      add("float w_c", {.float_w_c = true});
      add("channels last", {.layout = Layout::channels_last});
      add("odd", {.layout = Layout::odd});
      add("vector", {.height = 8, .width = 4});
      add("vector state", {.height = 8, .width = 8, .state = true});
      add("vector, state channels last",
          {.height = 8, .width = 4, .state = true, .state_layout = Layout::channels_last});
      add("narrow", {.channels = 20, .height = 5, .width = 1});
      add("wide", {.channels = 20, .height = 2, .width = 30});
      add("weak gate", {.frames = 12, .gate = 0.03});
      add("twins", {.clips = 1, .frames = 6, .channels = 64, .height = 8, .width = 8, .num_attn = 16, .twins = true});
    }
    return c;
  }();
  return all;
}

inline uint16_t narrow(float v, Dtype dtype) {
  return static_cast<uint16_t>(dtype == Dtype::bfloat16 ? dev::pack_bf16(v, 0) : dev::pack_f16(v, 0));
}

inline float widen(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? dev::bf16_low(bits) : dev::f16_low(bits);
}

inline float rounded(float v, Dtype dtype) {
  return dtype == Dtype::float32 ? v : widen(narrow(v, dtype), dtype);
}

// Values as a kernel reads them: rounded to the dtype, and stored in it.
struct Stored {
  std::vector<float> values;
  std::vector<uint16_t> halves;
  Dtype dtype;

  Stored(std::vector<float> from, Dtype to) : values(std::move(from)), dtype(to) {
    for (float& v : values) {
      v = rounded(v, dtype);
      if (dtype != Dtype::float32) {
        halves.push_back(narrow(v, dtype));
      }
    }
  }
  const void* data() const {
    return dtype == Dtype::float32 ? static_cast<const void*>(values.data()) : halves.data();
  }
};

// What a launch raises, or "".
template <class F>
std::string error_of(F launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

struct Results {
  std::vector<float> features, strips, carry, u, z_s, z_c, h;
};
