// Calls of refine in eval mode, by name.
#pragma once

#include "values.h"

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
    for (const auto& [name, of] : operands()) {
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
