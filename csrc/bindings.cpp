// The extension module: a record of the build. Importing it registers what csrc/ops and csrc/autograd.cpp have.

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
  return info;
}

}  // namespace
}  // namespace rru

// mod_gil_not_used: free-threaded Python may leave its lock off, as no state here changes after its first use.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "C++ kernels of rru_fast; importing it registers them with PyTorch's dispatcher.";
  m.def(
      "build_info", &rru::build_info,
      "The compiler and its flags, the PyTorch built for, the SIMD capabilities built and the one in use, whether "
      "bfloat16 is multiplied in bfloat16, and the CUDA architectures built for.");
}
