// One call of refine in eval mode by the emulated kernel, and in float64.
#pragma once

#include <cstring>

#include "refine_eval_cases.h"

class EvalTest {
 public:
  struct Results {
    std::vector<float> features, strips, carry, u, z_s, z_c, h;

    std::vector<const std::vector<float>*> all() const {
      return {&features, &strips, &carry, &u, &z_s, &z_c, &h};
    }
  };

  static const Cases& all_cases() {
    return cases();
  }

  inline static std::string only;  // there is one pass

  explicit EvalTest(const Case& c) : c_(c), p_(c.height * c.width) {
    const int n = c.clips, t = c.frames;
    x_ = random_(n * t * c.channels * p_, 1);
    state_x_ = random_(n * c.channels * p_, 1);
    state_s_ = random_(n * c.channels * p_, 1);
    w_ = random_(c.d * 2 * c.channels, 1 / std::sqrt(2.0 * c.channels));
    gamma_ = random_(c.d, 0.5, 1);
    beta_ = random_(c.d, 0.5);
    mean_ = random_(c.d, 0.5);
    var_ = random_(c.d, 0.2, 1);
    w_s1_ = random_(c.num_attn * p_, 1 / std::sqrt(p_));
    w_s2_ = random_(p_ * c.num_attn, 3 * c.gate);
    w_c_ = random_(c.channels * c.d, 3 * c.gate / std::sqrt(c.d));
    if (c.twins) {
      for (int i = 0; i < n * t; i++) {
        twin(x_.data() + i * c.channels * p_, c.channels, p_);
      }
      twin(w_c_.data(), c.channels, c.d);
    }
    for (auto* values : {&x_, &state_x_, &state_s_, &w_, &gamma_, &beta_, &w_s1_, &w_s2_}) {
      round_all(*values, c.dtype);
    }
    for (float& v : var_) {
      v = std::fabs(v) + 0.1f;
    }
    round_all(var_, c.dtype);
    round_all(mean_, c.dtype);
    round_all(w_c_, w_c_dtype());
    for (int i = 0; i < n; i++) {
      lengths_.push_back(1 + (3 * i + 1) % t);
    }
    lengths_.back() = t;
    wanted_ = reference();
  }

  // Runs the kernel; returns what it fails with, or "".
  std::string run(Results& r) {
    const int steps = c_.frames - (c_.state ? 0 : 1);
    r.features.assign(x_.size(), NAN);
    r.strips.assign(c_.clips * c_.channels * c_.height, NAN);
    r.carry.assign(state_s_.size(), NAN);
    r.z_s.assign(steps * c_.clips * p_, NAN);
    r.z_c.assign(steps * c_.clips * c_.channels, NAN);
    r.h.assign(steps * c_.clips * c_.num_attn, NAN);
    r.u = motion();
    const Stored w(w_, c_.dtype), gamma(gamma_, c_.dtype), beta(beta_, c_.dtype), mean(mean_, c_.dtype);
    const Stored var(var_, c_.dtype), w_s1(w_s1_, c_.dtype), w_s2(w_s2_, c_.dtype), w_c(w_c_, w_c_dtype());
    RefineWeights weights = weights_of(c_);
    weights.w = any(w);
    weights.gamma = any(gamma);
    weights.beta = any(beta);
    weights.running_mean = any(mean);
    weights.running_var = any(var);
    weights.eps = 1e-3f;
    if (c_.spatial) {
      weights.w_s1 = any(w_s1);
      weights.w_s2 = any(w_s2);
    }
    if (c_.channel) {
      weights.w_c = any(w_c);
    }
    std::vector<dev::float4> packed(emulated::refine_packed_bytes(weights) / 16);
    std::memset(static_cast<void*>(packed.data()), 0xff, packed.size() * 16);
    if (auto error = error_of([&] { emulated::refine_pack(weights, packed.data(), 0, nullptr); }); !error.empty()) {
      return error;
    }
    const Stored x(laid_out(x_, c_.frames, c_.layout), c_.dtype);
    const Stored state_s(laid_out(state_s_, 1, c_.state_layout), c_.dtype);
    std::vector<uint16_t> halves(r.features.size(), 0xffff);
    RefineEval a{};
    a.clips = c_.clips;
    a.frames = c_.frames;
    a.channels = c_.channels;
    a.positions = p_;
    a.width = c_.width;
    a.d = c_.d;
    a.num_attn = c_.num_attn;
    a.dtype = c_.dtype;
    a.float32 = c_.float32;
    a.w_c = w_c_dtype();
    a.spatial = c_.spatial;
    a.channel = c_.channel;
    a.has_state = c_.state;
    a.x = maps(x.data(), c_.frames, c_.layout);
    if (c_.state) {
      a.state = maps(state_s.data(), 1, c_.state_layout);
    }
    a.packed = packed.data();
    a.u = c_.motion ? r.u.data() : nullptr;
    a.u_out = r.u.data();
    a.u_first = c_.state ? 0 : 1;
    a.lengths = c_.ragged ? lengths_.data() : nullptr;
    a.carry = r.carry.data();
    a.features = c_.dtype == Dtype::float32 ? static_cast<void*>(r.features.data()) : halves.data();
    a.strips = r.strips.data();
    a.z_s = c_.spatial ? r.z_s.data() : nullptr;
    a.z_c = c_.channel ? r.z_c.data() : nullptr;
    a.h = c_.spatial ? r.h.data() : nullptr;
    const int split = c_.split > 0 ? c_.split : c_.frames;
    for (int first = 0; first < c_.frames; first += split) {
      a.first = first;
      a.end = first == 0 ? split : c_.frames;
      if (auto error = error_of([&] { emulated::refine_eval(a, 0, nullptr); }); !error.empty()) {
        return error;
      }
      if (first > 0) {
        break;
      }
    }
    if (c_.dtype != Dtype::float32) {
      for (size_t i = 0; i < halves.size(); i++) {
        r.features[i] = widen(halves[i], c_.dtype);
      }
    }
    return "";
  }

  // CTAs of all clusters, and warps of one.
  int warps() const {
    return c_.d > 32 ? 2 : 1;
  }
  int ctas() const {
    int ctas = c_.clips;
    for (int channels = 16 * warps(); channels < c_.channels; channels *= 2) {
      ctas *= 2;
    }
    return ctas;
  }

  Judgement judge(const Results& r) const {
    const bool exact = c_.dtype == Dtype::float32 && c_.float32 != Float32::tf32;
    const double products = exact ? 2e-6 : c_.dtype == Dtype::bfloat16 ? 8e-3 : 1e-3;  // of operands of 8 or 11 bits
    const double stored = c_.dtype == Dtype::bfloat16 ? 4e-3 : c_.dtype == Dtype::float16 ? 5e-4 : 0;
    const double gate = products * std::min(1.0, 3 * c_.gate) + 3e-7;
    Judgement judgement;
    judgement.compare("features", r.features, wanted_.features, gate + stored);
    judgement.compare("strips", r.strips, wanted_.strips, gate);
    judgement.compare("carry", r.carry, wanted_.carry, gate);
    judgement.compare("u", r.u, wanted_.u, products);
    if (c_.spatial) {
      judgement.compare("z_s", r.z_s, wanted_.z_s, 3 * products);
      judgement.compare("h", r.h, wanted_.h, 3 * products);
    }
    if (c_.channel) {
      judgement.compare("z_c", r.z_c, wanted_.z_c, 3 * products);
    }
    // Twins are channels of different CTAs, with the same arithmetic.
    if (c_.twins && judgement.worst < 1 && dev::adversary().noise == 0) {
      for (int clip = 0; clip < c_.clips * c_.frames; clip++) {
        const float* first = r.features.data() + clip * c_.channels * p_;
        if (!std::equal(first, first + c_.channels * p_ / 2, first + c_.channels * p_ / 2)) {
          judgement.text += ", twin channels differ";
          judgement.worst = INFINITY;
          return judgement;
        }
      }
    }
    return judgement;
  }

 private:
  Dtype w_c_dtype() const {
    return c_.float_w_c ? Dtype::float32 : c_.dtype;
  }

  // (B, F, C, P) in a layout.
  Maps maps(const void* data, int frames, Layout layout) const {
    const int64_t c = c_.channels, p = p_;
    switch (layout) {
      case Layout::channels_last:
        return {data, frames * p * c, p * c, 1, c};
      case Layout::odd:
        return {data, frames * c * (p + 1) * 3, c * (p + 1) * 3, (p + 1) * 3, 3};
      default:
        return {data, frames * c * p, c * p, p, 1};
    }
  }

  std::vector<float> laid_out(const std::vector<float>& values, int frames, Layout layout) const {
    const Maps m = maps(nullptr, frames, layout);
    std::vector<float> to(c_.clips * m.clip);
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); i++) {
      const int64_t p = i % p_, c = i / p_ % c_.channels, t = i / p_ / c_.channels % frames;
      to[i / p_ / c_.channels / frames * m.clip + t * m.frame + c * m.channel + p * m.position] = values[i];
    }
    return to;
  }

  float x(int clip, int t, int c, int p) const {
    return t < 0 ? state_x_[(clip * c_.channels + c) * p_ + p]
                 : x_[((clip * c_.frames + t) * c_.channels + c) * p_ + p];
  }

  int length(int clip) const {
    return c_.ragged ? static_cast<int>(lengths_[clip]) : c_.frames;
  }

  // W_m M_t of all gated frames, (N, B, D, P).
  std::vector<float> motion() const {
    const int start = c_.state ? 0 : 1;
    std::vector<float> u((c_.frames - start) * c_.clips * c_.d * p_, NAN);
    for (int t = start; t < c_.frames && c_.motion; t++) {
      for (int clip = 0; clip < c_.clips; clip++) {
        for (int d = 0; d < c_.d; d++) {
          for (int p = 0; p < p_; p++) {
            double sum = 0;
            for (int c = 0; c < c_.channels; c++) {
              const double m = static_cast<double>(x(clip, t, c, p)) - x(clip, t - 1, c, p);
              sum += w_[d * 2 * c_.channels + c_.channels + c] * m;
            }
            u[(((t - start) * c_.clips + clip) * c_.d + d) * p_ + p] = static_cast<float>(sum);
          }
        }
      }
    }
    return u;
  }

  Results reference() const {
    const int start = c_.state ? 0 : 1, steps = c_.frames - start, channels = c_.channels;
    Results r;
    r.features.assign(x_.size(), 0);
    r.strips.assign(c_.clips * channels * c_.height, 0);
    r.carry.assign(state_s_.size(), 0);
    r.u = std::vector<float>(steps * c_.clips * c_.d * p_, NAN);
    r.z_s.assign(steps * c_.clips * p_, NAN);
    r.z_c.assign(steps * c_.clips * channels, NAN);
    r.h.assign(steps * c_.clips * c_.num_attn, NAN);
    const std::vector<float> moved = motion();
    for (int clip = 0; clip < c_.clips; clip++) {
      std::vector<double> s(channels * p_), strips(channels * c_.height);
      for (int i = 0; i < channels * p_; i++) {
        s[i] = c_.state ? state_s_[clip * channels * p_ + i] : x(clip, 0, i / p_, i % p_);
      }
      for (int t = 0; t < length(clip); t++) {
        if (t >= start) {
          step(r, moved, s, clip, t, t - start);
        }
        for (int i = 0; i < channels * p_; i++) {
          r.features[(clip * c_.frames + t) * channels * p_ + i] = static_cast<float>(s[i]);
          strips[i / p_ * c_.height + i % p_ / c_.width] += s[i];
        }
      }
      for (int i = 0; i < channels * p_; i++) {
        r.carry[clip * channels * p_ + i] = static_cast<float>(s[i]);
      }
      for (int i = 0; i < channels * c_.height; i++) {
        r.strips[clip * channels * c_.height + i] = static_cast<float>(strips[i]);
      }
    }
    return r;
  }

  void step(Results& r, const std::vector<float>& moved, std::vector<double>& s, int clip, int t, int n) const {
    const int channels = c_.channels, row = n * c_.clips + clip;
    std::vector<double> pooled(p_), means(c_.d), h(c_.num_attn), z_s(p_, 1);
    for (int d = 0; d < c_.d; d++) {
      for (int p = 0; p < p_; p++) {
        const int at = (row * c_.d + d) * p_ + p;
        double u = c_.motion ? moved[at] : 0;
        for (int c = 0; c < channels; c++) {
          u += w_[d * 2 * channels + c] * (x(clip, t, c, p) - s[c * p_ + p]);
        }
        r.u[at] = static_cast<float>(u);
        const double y = std::max(0.0, gamma_[d] * (u - mean_[d]) / std::sqrt(var_[d] + 1e-3) + beta_[d]);
        pooled[p] += y / c_.d;
        means[d] += y / p_;
      }
    }
    for (int a = 0; a < c_.num_attn && c_.spatial; a++) {
      for (int p = 0; p < p_; p++) {
        h[a] += w_s1_[a * p_ + p] * pooled[p];
      }
      h[a] = std::max(0.0, h[a]);
      r.h[row * c_.num_attn + a] = static_cast<float>(h[a]);
    }
    for (int p = 0; p < p_ && c_.spatial; p++) {
      z_s[p] = 0;
      for (int a = 0; a < c_.num_attn; a++) {
        z_s[p] += w_s2_[p * c_.num_attn + a] * h[a];
      }
      r.z_s[row * p_ + p] = static_cast<float>(z_s[p]);
    }
    for (int c = 0; c < channels; c++) {
      double z_c = c_.channel ? 0 : 1;
      for (int d = 0; d < c_.d && c_.channel; d++) {
        z_c += w_c_[c * c_.d + d] * means[d];
      }
      r.z_c[row * channels + c] = static_cast<float>(z_c);
      for (int p = 0; p < p_; p++) {
        s[c * p_ + p] += (x(clip, t, c, p) - s[c * p_ + p]) / (1 + std::exp(-z_c * z_s[p]));
      }
    }
  }

  const Case c_;
  const int p_;
  Random random_;
  std::vector<float> x_, state_x_, state_s_, w_, gamma_, beta_, mean_, var_, w_s1_, w_s2_, w_c_;
  std::vector<int64_t> lengths_;
  Results wanted_;
};
