// 16-bit numbers on a CPU, as a GPU converts them: rounded to nearest even, NaN to one NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace rru::emulated::dev {

inline uint32_t float_as_uint(float v) {
  return std::bit_cast<uint32_t>(v);
}
inline float uint_as_float(uint32_t v) {
  return std::bit_cast<float>(v);
}

inline float bf16_to_float(uint32_t bits) {
  return uint_as_float(bits << 16);
}

inline float f16_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  if (exponent == 0) {
    const float size = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -size : size;
  }
  return uint_as_float(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13);
}

inline uint32_t float_to_bf16(float value) {
  const uint32_t bits = float_as_uint(value);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t float_to_f16(float value) {
  const uint32_t sign = float_as_uint(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (std::isnan(value)) {
    return 0x7fff;
  }
  if (size >= 65520) {
    return sign | 0x7c00;
  }
  if (size < 0x1p-14f) {  // subnormal, in units of 2^-24
    return sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24)));
  }
  const uint32_t bits = float_as_uint(size);
  return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

inline float bf16_low(uint32_t pair) {
  return bf16_to_float(pair & 0xffff);
}

inline float bf16_high(uint32_t pair) {
  return bf16_to_float(pair >> 16);
}

inline float f16_low(uint32_t pair) {
  return f16_to_float(pair & 0xffff);
}

inline float f16_high(uint32_t pair) {
  return f16_to_float(pair >> 16);
}

inline uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low) | float_to_bf16(high) << 16;
}

inline uint32_t pack_f16(float low, float high) {
  return float_to_f16(low) | float_to_f16(high) << 16;
}

}  // namespace rru::emulated::dev
