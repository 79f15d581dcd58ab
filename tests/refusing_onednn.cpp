// Interposes ATen's products: those of the sizes in $REFUSE ("odd", "all") throw, as if oneDNN had no kernel for them.
// The file $REFUSED is created by the first of them.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace c10 {
struct BFloat16;
}

namespace at::native::cpublas {

template <typename E>
void pass_on(
    const char* symbol, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const E* a,
    const E* b, float* c, bool is_vnni) {
  const char* refuse = std::getenv("REFUSE");
  if (std::strcmp(refuse, "all") == 0 || (m + n + k) % 2 != 0) {
    static FILE* const refused = std::fopen(std::getenv("REFUSED"), "w");
    std::fputs("refused\n", refused);
    throw std::runtime_error("could not generate a kernel");
  }
  using F = void(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const E*, const E*, float*, bool);
  static void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  reinterpret_cast<F*>(dlsym(torch, symbol))(m, n, k, lda, ldb, ldc, add, a, b, c, is_vnni);
}

__attribute__((visibility("default"))) void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a, const float* b,
    float* c, bool is_vnni) {
  pass_on("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb", m, n, k, lda, ldb, ldc, add, a, b, c, is_vnni);
}

__attribute__((visibility("default"))) void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* a,
    const c10::BFloat16* b, float* c, bool is_vnni) {
  pass_on("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", m, n, k, lda, ldb, ldc, add, a, b, c, is_vnni);
}

}  // namespace at::native::cpublas
