// Runs tests of an emulated kernel under an adversary that the command line sets up.
//
//   PROGRAM CASE... [--omit SITE] [--hold SITE CTA WARP PASS] ...     results and errors of the cases
//   PROGRAM CASE... --only PASS ...                                   an adversary of the forward or the backward alone
//   PROGRAM --list                                                    all cases
//
// Prints a line per case; exits with 1 if a result is wrong, and with 2 if the kernel fails.
#pragma once

#include <cstdlib>
#include <cstring>

#include "values.h"

// TEST is constructed of a case; it has all_cases(), only, run(Results&), judge(Results), ctas() and warps().
template <class TEST>
class Program {
  using Results = typename TEST::Results;

 public:
  static int main(int argc, char** argv) {
    dev::Adversary& adversary = dev::adversary();
    std::vector<std::string> names;
    bool twice = false, holds = false, sites = false;
    for (int i = 1; i < argc; i++) {
      const std::string word = argv[i];
      const auto next = [&] { return i + 1 < argc ? argv[++i] : ""; };
      if (word == "--list") {
        for (const auto& [name, of] : TEST::all_cases()) {
          std::printf("%s\n", name.c_str());
        }
        return 0;
      } else if (word == "--omit") {
        adversary.omit = next();
      } else if (word == "--replace") {
        adversary.replace = next();
      } else if (word == "--shorten") {
        adversary.shorten = next();
      } else if (word == "--relax") {
        adversary.relax = next();
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
      } else if (word == "--only") {
        TEST::only = next();
      } else if (TEST::all_cases().count(word) == 1) {
        names.push_back(word);
      } else {
        std::fprintf(stderr, "got '%s', wanted a case of --list or an option\n", word.c_str());
        return 3;
      }
    }
    if (names.empty()) {
      for (const auto& [name, of] : TEST::all_cases()) {
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

 private:
  static bool is_same(const Results& a, const Results& b) {
    const auto first = a.all(), second = b.all();
    for (size_t i = 0; i < first.size(); i++) {
      if (std::memcmp(first[i]->data(), second[i]->data(), first[i]->size() * sizeof(float)) != 0) {
        return false;
      }
    }
    return true;
  }

  // Runs a case; returns the exit status.
  static int run(const std::string& name, bool twice) {
    TEST test(TEST::all_cases().at(name));
    Results first, second;
    std::string error = test.run(first);
    if (error.empty() && twice) {
      error = test.run(second);
    }
    if (!error.empty()) {
      std::printf("%s: failed: %s\n", name.c_str(), error.c_str());
      return 2;
    }
    Judgement judgement = test.judge(first);
    if (twice && !is_same(first, second)) {
      judgement.text += ", two runs differ";
      judgement.worst = INFINITY;
    }
    const bool is_right = judgement.worst <= 1;
    std::printf("%s: %s:%s\n", name.c_str(), is_right ? "right" : "wrong", judgement.text.c_str());
    return is_right ? 0 : 1;
  }

  // Runs a case with every warp and CTA held in turn behind every site at every pass; returns the exit status.
  static int hold_all(const std::string& name) {
    dev::Adversary& adversary = dev::adversary();
    TEST test(TEST::all_cases().at(name));
    Results plain;
    dev::forget_sites();
    if (auto error = test.run(plain); !error.empty()) {
      std::printf("%s: failed: %s\n", name.c_str(), error.c_str());
      return 2;
    }
    const int warps = test.warps(), ctas = test.ctas();
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
};
