// The extension module: records of the build and of what has run. Importing it registers what csrc/ops and
// csrc/autograd.cpp have.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "ops/operators.h"

namespace rru {
namespace {

pybind11::dict build_info() {
  const auto words = [](const std::string& text) {
    pybind11::list list;
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
      list.append(word);
    }
    return list;
  };
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["flags"] = RRU_FLAGS;
  info["torch"] = RRU_TORCH_VERSION;
  info["simd"] = words(RRU_CAPABILITIES);
  info["simd_here"] = at::get_cpu_capability();
  info["bfloat16_here"] = RRU_KERNEL(multiplies_bfloat16)();
  info["cuda_architectures"] = words(RRU_CUDA_ARCHITECTURES);
#ifdef RRU_HAS_EMULATION
  info["emulation"] = true;
#else
  info["emulation"] = false;
#endif
  return info;
}

pybind11::list ran_operators() {
  pybind11::list list;
  const auto add = [&](const char* name, bool has_run) {
    if (has_run) {
      list.append(name);
    }
  };
  add("refine", ran().refine);
  add("strip_pool", ran().strip_pool);
  add("batch_hard", ran().batch_hard);
  return list;
}

bool is_faster_in_composite_by_name(
    const std::string& dtype, int64_t clips, int64_t channels, int64_t positions, int64_t hidden, bool training) {
  const auto type = dtype == "float64" ? at::kDouble
      : dtype == "bfloat16"            ? at::kBFloat16
      : dtype == "float16"             ? at::kHalf
                                       : at::kFloat;
  return is_faster_in_composite(type, clips, channels, positions, hidden, training);
}

void forget_runs() {
  ran().refine = ran().strip_pool = ran().batch_hard = false;
}

}  // namespace
}  // namespace rru

// mod_gil_not_used: free-threaded Python may leave its lock off, as the only state that changes here is atomic.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "C++ kernels of rru_fast; importing it registers them with PyTorch's dispatcher.";
  m.def(
      "build_info", &rru::build_info,
      "The compiler and its flags, the PyTorch built for, the SIMD capabilities built and the one in use, whether "
      "bfloat16 is multiplied in bfloat16, the CUDA architectures built for, and whether CUDA kernels can be emulated.");
  m.def("ran", &rru::ran_operators, "The operators that these kernels have run in this process, since forget_runs.");
  m.def(
      "is_faster_in_composite", &rru::is_faster_in_composite_by_name,
      "Whether refine on maps of so few positions runs in composite with \"auto\".");
  m.def("forget_runs", &rru::forget_runs, "Have ran begin anew.");
}
