// rru_fast::batch_hard for CPUs: arguments checked, the kernels of csrc/cpu, the loss reduced.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "ops/operators.h"

namespace rru {
namespace {

using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The arguments of batch_hard and of its backward, checked; features (N, D) become one group.
BatchHardArguments batch_hard_arguments(
    const Tensor& features, const Tensor& labels, const OptionalTensor& gallery, const OptionalTensor& gallery_labels,
    double margin, bool soft, c10::string_view metric) {
  check_floating("features", features, features.dim() == 2 ? 2 : 3);
  const auto grouped = [&](const Tensor& tensor) { return features.dim() == 2 ? tensor.unsqueeze(0) : tensor; };
  const auto codes = [](const char* name, const Tensor& tensor, int64_t size) {
    check(name, tensor, {size});
    TORCH_CHECK_TYPE(
        at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false), name, ": got dtype ", tensor.scalar_type(),
        ", wanted an integer dtype");
    return tensor.to(at::kLong).contiguous();
  };
  TORCH_CHECK_VALUE(
      metric == "euclidean" || metric == "cosine", "metric: got '", metric, "', wanted 'euclidean' or 'cosine'");
  TORCH_CHECK_VALUE(
      gallery.has_value() == gallery_labels.has_value(),
      "gallery, gallery_labels: got one of them, wanted both or neither");
  BatchHardArguments arguments{
      .features = grouped(features),
      .labels = codes("labels", labels, features.size(-2)),
      .margin = margin,
      .soft = soft,
      .cosine = metric == "cosine"};
  if (gallery) {
    check_floating("gallery", *gallery, features.dim());
    auto wanted = features.sizes().vec();
    wanted[features.dim() - 2] = gallery->size(-2);
    check("gallery", *gallery, wanted, features.scalar_type());
    arguments.gallery = grouped(*gallery);
    arguments.gallery_labels = codes("gallery_labels", *gallery_labels, gallery->size(-2));
  }
  return arguments;
}

void check_reduction(c10::string_view reduction) {
  TORCH_CHECK_VALUE(
      reduction == "mean" || reduction == "sum" || reduction == "none", "reduction: got '", reduction,
      "', wanted 'mean', 'sum' or 'none'");
}

Tensors5 batch_hard(
    const Tensor& features, const Tensor& labels, const OptionalTensor& gallery, const OptionalTensor& gallery_labels,
    double margin, bool soft, c10::string_view metric, c10::string_view reduction, c10::string_view backend) {
  if (!is_for_cpu_kernels(backend)) {
    return call_python<&batch_hard>(
        "rru_fast::batch_hard_python", features, labels, gallery, gallery_labels, margin, soft, metric, reduction,
        backend);
  }
  check_reduction(reduction);
  ran().batch_hard = true;
  const auto [loss, saved] = RRU_KERNEL(batch_hard)(
      batch_hard_arguments(features, labels, gallery, gallery_labels, margin, soft, metric));
  const auto per_anchor = [&](const Tensor& tensor) { return features.dim() == 2 ? tensor.squeeze(0) : tensor; };
  const Tensor reduced = reduction == "mean" ? loss.mean() : reduction == "sum" ? loss.sum() : per_anchor(loss);
  return {
      reduced.to(features.scalar_type()), per_anchor(saved.d_pos), per_anchor(saved.d_neg), per_anchor(saved.positive),
      per_anchor(saved.negative)};
}

std::tuple<Tensor, Tensor> batch_hard_backward(
    const OptionalTensor& d_loss, const OptionalTensor& d_d_pos, const OptionalTensor& d_d_neg, const Tensor& d_pos,
    const Tensor& d_neg, const Tensor& positive, const Tensor& negative, const Tensor& features, const Tensor& labels,
    const OptionalTensor& gallery, const OptionalTensor& gallery_labels, double margin, bool soft,
    c10::string_view metric, c10::string_view reduction, c10::List<bool> need, c10::string_view backend) {
  if (!is_for_cpu_kernels(backend)) {
    return call_python<&batch_hard_backward>(
        "rru_fast::batch_hard_backward_python", d_loss, d_d_pos, d_d_neg, d_pos, d_neg, positive, negative, features,
        labels, gallery, gallery_labels, margin, soft, metric, reduction, need, backend);
  }
  check_reduction(reduction);
  TORCH_CHECK_VALUE(need.size() == 2, "need: got ", need.size(), " values, wanted 2, one per gradient");
  const auto arguments = batch_hard_arguments(features, labels, gallery, gallery_labels, margin, soft, metric);
  const auto dtype = acc_dtype(features);
  const auto per_anchor = features.sizes().slice(0, features.dim() - 1);
  const int64_t groups = arguments.features.size(0), n = arguments.features.size(1);
  const int64_t m = arguments.gallery ? arguments.gallery->size(1) : n;
  const auto dense = [&](const char* name, const Tensor& tensor, at::ScalarType wanted) {
    check(name, tensor, per_anchor, wanted);
    return tensor.reshape({groups, n}).contiguous();
  };
  const auto indices = [&](const char* name, const Tensor& tensor) {
    const Tensor result = dense(name, tensor, at::kLong);
    const int64_t* index = result.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < groups * n; i++) {
      TORCH_CHECK_INDEX(index[i] >= -1 && index[i] < m, name, ": got index ", index[i], ", wanted -1 to ", m - 1);
    }
    return result;
  };
  BatchHardUpstream upstream;
  if (d_loss && reduction == "none") {
    upstream.d_loss = dense("d_loss", *d_loss, features.scalar_type()).to(dtype);
  } else if (d_loss) {
    check("d_loss", *d_loss, {}, features.scalar_type());
    const double each = d_loss->item<double>() / (reduction == "mean" ? static_cast<double>(groups * n) : 1);
    upstream.d_loss = at::full({groups, n}, each, features.options().dtype(dtype));
  }
  if (d_d_pos) {
    upstream.d_d_pos = dense("d_d_pos", *d_d_pos, dtype);
  }
  if (d_d_neg) {
    upstream.d_d_neg = dense("d_d_neg", *d_d_neg, dtype);
  }
  const BatchHardSaved saved{
      .d_pos = dense("d_pos", d_pos, dtype),
      .d_neg = dense("d_neg", d_neg, dtype),
      .positive = indices("positive", positive),
      .negative = indices("negative", negative)};
  const auto d =
      RRU_KERNEL(batch_hard_backward)(upstream, saved, arguments, {.features = need[0], .gallery = need[1]});
  const auto shaped = [&](const Tensor& tensor, const OptionalTensor& like) {
    return tensor.defined() ? tensor.view(like->sizes()) : at::empty({0}, features.options());
  };
  return {shaped(d.features, features), shaped(d.gallery, gallery)};
}

TORCH_LIBRARY_IMPL(rru_fast, CPU, m) {
  m.impl("batch_hard", TORCH_FN(batch_hard));
  m.impl("batch_hard_backward", TORCH_FN(batch_hard_backward));
}

}  // namespace
}  // namespace rru
