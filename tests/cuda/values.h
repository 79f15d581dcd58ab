// Values of tensors as tests of the emulated kernels make, store and compare them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulation.h"
#include "cuda/kernels.h"

using namespace rru;
namespace dev = rru::emulated::dev;

// Dtypes of maps, and how fp32 is multiplied, by the name with which cases begin.
inline const std::map<std::string, std::pair<Dtype, Float32>>& operands() {
  static const std::map<std::string, std::pair<Dtype, Float32>> all{
      {"bf16", {Dtype::bfloat16, Float32::tf32}},
      {"f16", {Dtype::float16, Float32::tf32}},
      {"tf32", {Dtype::float32, Float32::tf32}},
      {"tf32x3", {Dtype::float32, Float32::tf32x3}},
      {"fp32", {Dtype::float32, Float32::ieee}}};
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

inline AnyTensor any(const Stored& stored) {
  return {stored.data(), stored.dtype};
}

// Sizes and dtypes of a case's weights, w a half of its rows; the tensors are the caller's to set.
template <class CASE>
RefineWeights weights_of(const CASE& c) {
  RefineWeights weights{};
  weights.channels = c.channels;
  weights.positions = c.height * c.width;
  weights.d = c.d;
  weights.num_attn = c.num_attn;
  weights.dtype = c.dtype;
  weights.float32 = c.float32;
  weights.w_row = 2 * c.channels;
  weights.w_c.dtype = c.float_w_c ? Dtype::float32 : c.dtype;
  return weights;
}

// Makes the second half of the channels equal the first.
inline void twin(float* values, int channels, int per_channel) {
  std::copy_n(values, channels / 2 * per_channel, values + channels / 2 * per_channel);
}

// Normal numbers.
class Random {
 public:
  std::vector<float> operator()(int count, double scale, double center = 0) {
    std::normal_distribution<double> draw(center, scale);
    std::vector<float> values(count);
    for (float& v : values) {
      v = static_cast<float>(draw(generator_));
    }
    return values;
  }

 private:
  std::mt19937 generator_{7};
};

inline void round_all(std::vector<float>& values, Dtype dtype) {
  for (float& v : values) {
    v = rounded(v, dtype);
  }
}

// Relative errors, and the largest ratio of one to what is allowed; NaN is wanted where there is nothing to compare.
struct Judgement {
  double worst = 0;
  std::string text;

  void compare(const char* name, const std::vector<float>& got, const std::vector<float>& wanted, double allowed) {
    double off = 0, size = 1e-30;
    for (size_t i = 0; i < got.size(); i++) {
      if (!std::isnan(wanted[i])) {
        off += std::pow(static_cast<double>(got[i]) - wanted[i], 2);
        size += std::pow(static_cast<double>(wanted[i]), 2);
      }
    }
    const double error = std::sqrt(off / size), ratio = std::isnan(error) ? INFINITY : error / allowed;
    worst = std::max(worst, ratio);
    char line[80];
    std::snprintf(line, sizeof line, " %s %.1e", name, error);
    text += line;
  }
};
