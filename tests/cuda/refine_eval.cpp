// Runs the emulated kernel against float64, under an adversary that the command line sets up.
//
//   refine_eval CASE... [--omit SITE] [--hold SITE CTA WARP PASS] ...     results and errors of the cases
//   refine_eval --list                                                    all cases
//
// Prints a line per case; exits with 1 if a result is wrong, and with 2 if the kernel fails.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "refine_test.h"

namespace {

bool is_same(const Results& a, const Results& b) {
  const auto same = [](const std::vector<float>& v, const std::vector<float>& w) {
    return std::memcmp(v.data(), w.data(), v.size() * sizeof(float)) == 0;
  };
  return same(a.features, b.features) && same(a.strips, b.strips) && same(a.carry, b.carry) && same(a.u, b.u);
}

// Runs a case; returns the exit status.
int run(const std::string& name, bool twice) {
  Test test(cases().at(name));
  Results first, second;
  std::string text;
  std::string error = test.run(first);
  if (error.empty() && twice) {
    error = test.run(second);
  }
  if (!error.empty()) {
    std::printf("%s: failed: %s\n", name.c_str(), error.c_str());
    return 2;
  }
  double worst = test.judge(first, text);
  if (twice && !is_same(first, second)) {
    text += ", two runs differ";
    worst = INFINITY;
  }
  std::printf("%s: %s:%s\n", name.c_str(), worst <= 1 ? "right" : "wrong", text.c_str());
  return worst <= 1 ? 0 : 1;
}

// Runs a case with every warp and CTA held in turn behind every site at every pass; returns the exit status.
int hold_all(const std::string& name) {
  dev::Adversary& adversary = dev::adversary();
  Test test(cases().at(name));
  Results plain;
  dev::forget_sites();
  if (auto error = test.run(plain); !error.empty()) {
    std::printf("%s: failed: %s\n", name.c_str(), error.c_str());
    return 2;
  }
  const Case& c = cases().at(name);
  const int warps = c.d > 32 ? 2 : 1;
  int ctas = c.clips;  // of all clusters
  for (int channels = 16 * warps; channels < c.channels; channels *= 2) {
    ctas *= 2;
  }
  int holds = 0;
  for (const dev::Site& site : dev::sites()) {
    for (int pass = 0; pass < site.passes; pass++) {
      for (int cta = 0; cta < ctas; cta++) {
        for (int warp = -1; warp < (warps > 1 ? warps : 0); warp++) {
          adversary.hold = site.name;
          adversary.cta = cta;
          adversary.warp = warp;
          adversary.pass = pass;
          Results held;
          const std::string error = test.run(held);
          if (!error.empty() || !is_same(plain, held)) {
            std::printf(
                "%s: CTA %d, warp %d held behind '%s', pass %d: %s\n", name.c_str(), cta, warp, site.name, pass,
                error.empty() ? "the results differ" : error.c_str());
            return error.empty() ? 1 : 2;
          }
          holds++;
        }
      }
    }
  }
  adversary.hold = "";
  std::printf("%s: right, %d holds\n", name.c_str(), holds);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  dev::Adversary& adversary = dev::adversary();
  std::vector<std::string> names;
  bool twice = false, holds = false, sites = false;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    const auto next = [&] { return i + 1 < argc ? argv[++i] : ""; };
    if (word == "--list") {
      for (const auto& [name, of] : cases()) {
        std::printf("%s\n", name.c_str());
      }
      return 0;
    } else if (word == "--omit") {
      adversary.omit = next();
    } else if (word == "--replace") {
      adversary.replace = next();
    } else if (word == "--shorten") {
      adversary.shorten = next();
    } else if (word == "--mutant") {
      adversary.mutant = next();
    } else if (word == "--hold") {
      adversary.hold = next();
      adversary.cta = std::atoi(next());
      adversary.warp = std::atoi(next());
      adversary.pass = std::atoi(next());
    } else if (word == "--late") {
      adversary.late = true;
    } else if (word == "--last-first") {
      adversary.last_first = true;
    } else if (word == "--noise") {
      adversary.noise = static_cast<uint32_t>(std::atoi(next()));
    } else if (word == "--twice") {
      twice = true;
    } else if (word == "--hold-all") {
      holds = true;
    } else if (word == "--sites") {
      sites = true;
    } else if (cases().count(word) == 1) {
      names.push_back(word);
    } else {
      std::fprintf(stderr, "got '%s', wanted a case of --list or an option\n", word.c_str());
      return 3;
    }
  }
  if (names.empty()) {
    for (const auto& [name, of] : cases()) {
      names.push_back(name);
    }
  }
  int status = 0;
  for (const std::string& name : names) {
    status = std::max(status, holds ? hold_all(name) : run(name, twice));
  }
  for (const dev::Site& site : sites ? dev::sites() : std::vector<dev::Site>{}) {
    std::printf("site %s: %s\n", site.kind, site.name);
  }
  return status;
}
