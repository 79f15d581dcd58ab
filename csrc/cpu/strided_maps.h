// Maps of any strides and dtype, read as rows of the arithmetic dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

// Channels gathered together: where positions are strided, as in channels-last, channels are usually adjacent, and a
// cache line holds this many of them.
constexpr int64_t kGatherChannels = 16;

template <typename Acc>
struct alignas(64) GatherBuffer {
  Acc values[kGatherChannels * kMaxRow];
  const void* source = nullptr;  // address of the first element gathered
};

// Maps (B, T, C, H, W), or (B, C, H, W) as one frame.
template <typename T>
class StridedMaps {
 public:
  explicit StridedMaps(const at::Tensor& maps)
      : data_(maps.const_data_ptr<T>()), channels_(maps.size(-3)), width_(maps.size(-1)) {
    const auto strides = maps.strides();
    const auto dims = maps.dim();
    column_stride_ = strides[dims - 1];
    row_stride_ = strides[dims - 2];
    channel_stride_ = strides[dims - 3];
    frame_stride_ = dims == 5 ? strides[1] : 0;
    clip_stride_ = strides[0];
    const bool dense_columns = column_stride_ == 1 || width_ == 1;
    const bool dense_rows = row_stride_ == width_ || maps.size(-2) == 1;
    dense_ = dense_columns && dense_rows;
  }

  // Positions p0 to p0 + n of one channel. Strided positions are gathered into `buffer`, where calls for the next
  // channels find theirs; the maps are never copied as a whole.
  template <typename Acc>
  const Acc* row(
      int64_t clip, int64_t frame, int64_t channel, int64_t p0, int64_t n, GatherBuffer<Acc>& buffer) const {
    if (dense_) {
      const T* from = data_ + clip * clip_stride_ + frame * frame_stride_ + channel * channel_stride_ + p0;
      return load(from, n, buffer.values);
    }
    return gather(clip, frame, channel, p0, n, buffer);
  }

 private:
  template <typename Acc>
  C10_NOINLINE const Acc* gather(
      int64_t clip, int64_t frame, int64_t channel, int64_t p0, int64_t n, GatherBuffer<Acc>& buffer) const {
    const int64_t c0 = channel / kGatherChannels * kGatherChannels, count = std::min(kGatherChannels, channels_ - c0);
    int64_t h = p0 / width_, w = p0 % width_;
    const T* maps = data_ + clip * clip_stride_ + frame * frame_stride_ + c0 * channel_stride_;
    if (buffer.source != maps + h * row_stride_ + w * column_stride_) {
      buffer.source = maps + h * row_stride_ + w * column_stride_;
      std::fill(buffer.values, buffer.values + kGatherChannels * kMaxRow, Acc(0));
      for (int64_t i = 0; i < n; i++) {
        const T* from = maps + h * row_stride_ + w * column_stride_;
        for (int64_t c = 0; c < count; c++) {
          buffer.values[c * kMaxRow + i] = static_cast<Acc>(from[c * channel_stride_]);
        }
        if (++w == width_) {
          w = 0;
          h++;
        }
      }
    }
    return buffer.values + (channel - c0) * kMaxRow;
  }

  const T* data_;
  int64_t channels_, width_, column_stride_, row_stride_, channel_stride_, frame_stride_, clip_stride_;
  bool dense_;  // the positions of each map are contiguous
};

template <typename T>
std::optional<StridedMaps<T>> as_strided_maps(const std::optional<at::Tensor>& maps) {
  return maps ? std::optional<StridedMaps<T>>(*maps) : std::nullopt;
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
