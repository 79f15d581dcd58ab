// One forward and backward of refine in training mode by the emulated kernels, and in float64.
#pragma once

#include <cstring>

#include "values.h"

struct TrainingCase {
  int clips = 2, frames = 4, channels = 32, height = 4, width = 2, d = 32, num_attn = 8, groups = 1;
  int multiple = 0;  // of channels a CTA; 0: the kernels' choice
  Dtype dtype = Dtype::float32;
  Float32 float32 = Float32::ieee;
  bool spatial = true, channel = true, motion = true, float_w_c = false;
  bool d_features = true, d_strips = true;  // gradients that there are
  bool strided = false;                     // clips and frames apart
  double gate = 1;                          // scale of the attention weights
  int launches = 1;
  bool twins = false;  // the second half of the channels equals the first, in maps, gradients and weights
};

using TrainingCases = std::map<std::string, TrainingCase>;

inline const TrainingCases& training_cases() {
  static const TrainingCases all = [] {
    TrainingCases c;
    for (const auto& [name, of] : operands()) {
      if (name == "tf32x3") {
        continue;  // Triton's
      }
      const auto add = [&, of = of](const std::string& suffix, TrainingCase base) {
        base.dtype = of.first;
        base.float32 = of.second;
        c[name + " " + suffix] = base;
      };
      add("plain", {});
      add("tail", {.clips = 3, .frames = 3, .channels = 27, .height = 4, .width = 3, .d = 29, .num_attn = 5});
      add("four CTAs", {.frames = 3, .channels = 64, .height = 8, .width = 8, .num_attn = 16});
      add("four times the channels", {.frames = 3, .channels = 59, .height = 8, .width = 8, .multiple = 4});
      add("four times, four CTAs", {.clips = 3, .frames = 3, .channels = 250, .multiple = 4});
      add("two warps", {.frames = 3, .channels = 59, .height = 8, .width = 8, .d = 64, .num_attn = 32});
      add("two warps, twice the channels",
          {.frames = 3, .channels = 120, .height = 6, .width = 4, .d = 60, .num_attn = 30, .multiple = 2});
      add("two warps, eight CTAs", {.clips = 1, .frames = 3, .channels = 256, .d = 60, .num_attn = 30});
      add("sixteen CTAs", {.clips = 1, .frames = 3, .channels = 250, .height = 5, .width = 2, .d = 30});
      add("one CTA", {.clips = 5, .frames = 3, .channels = 16, .height = 8, .width = 2});
      add("one clip", {.clips = 1, .frames = 6});
      add("one frame", {.frames = 1});
      add("two frames", {.frames = 2});
      add("groups", {.clips = 6, .frames = 3, .channels = 20, .groups = 3});
      add("spatial", {.channel = false});
      add("channel", {.spatial = false});
      add("appearance", {.motion = false});
      add("float w_c", {.float_w_c = true});
      add("strips alone", {.d_features = false});
      add("features alone", {.d_strips = false});
      add("strided", {.height = 4, .width = 4, .strided = true});
      add("narrow", {.channels = 20, .height = 9, .width = 1});
      add("wide", {.channels = 20, .height = 2, .width = 30});
      add("wider", {.channels = 20, .height = 1, .width = 47});
      add("threes", {.channels = 20, .height = 7, .width = 3});
      add("weak gate", {.frames = 12, .gate = 0.03});
      add("twins", {.clips = 2, .frames = 4, .channels = 64, .height = 8, .width = 8, .num_attn = 16, .twins = true});
    }
    // More clips than the chip holds, a group at a time.
    c["fp32 a launch a group"] = {
        .clips = 8, .frames = 2, .channels = 256, .height = 2, .groups = 2, .multiple = 1, .launches = 2};
    return c;
  }();
  return all;
}

class TrainingTest {
 public:
  struct Results {
    std::vector<float> features, strips, mean, var, u, z_s, z_c, h;
    std::vector<float> d_x, du, d_z_s, d_z_c, d_h, y_channels, y_positions, d_beta, d_gamma;

    std::vector<const std::vector<float>*> all() const {
      return {&features, &strips, &mean,  &var, &u,          &z_s,         &z_c,    &h,      &d_x,
              &du,       &d_z_s,  &d_z_c, &d_h, &y_channels, &y_positions, &d_beta, &d_gamma};
    }
  };

  static const TrainingCases& all_cases() {
    return training_cases();
  }

  inline static std::string only;  // the pass that the adversary is for, "" for both

  explicit TrainingTest(const TrainingCase& c)
      : c_(c),
        p_(c.height * c.width),
        row_((p_ + 7) / 8 * 8),
        n_(c.frames - 1),
        maps_(c.clips * c.frames * c.channels) {
    x_ = random_(maps_ * p_, 1);
    d_features_ = random_(maps_ * p_, 1);
    d_strips_ = random_(c.clips * c.channels * c.height, 1.0 / c.frames / c.width);
    w_ = random_(c.d * 2 * c.channels, 1 / std::sqrt(2.0 * c.channels));
    gamma_ = random_(c.d, 0.5, 1);
    beta_ = random_(c.d, 0.5);
    w_s1_ = random_(c.num_attn * p_, 1 / std::sqrt(p_));
    w_s2_ = random_(p_ * c.num_attn, 3 * c.gate);
    w_c_ = random_(c.channels * c.d, 3 * c.gate / std::sqrt(c.d));
    if (c.twins) {
      for (int i = 0; i < c.clips * c.frames; i++) {
        twin(x_.data() + i * c.channels * p_, c.channels, p_);
        twin(d_features_.data() + i * c.channels * p_, c.channels, p_);
      }
      for (int i = 0; i < c.clips; i++) {
        twin(d_strips_.data() + i * c.channels * c.height, c.channels, c.height);
      }
      for (int i = 0; i < 2 * c.d; i++) {
        twin(w_.data() + i * c.channels, c.channels, 1);
      }
      twin(w_c_.data(), c.channels, c.d);
    }
    for (auto* values : {&x_, &d_features_, &w_, &gamma_, &beta_, &w_s1_, &w_s2_}) {
      round_all(*values, c.dtype);
    }
    round_all(w_c_, w_c_dtype());
    wanted_ = forward();
  }

  // Runs both kernels; returns what they fail with, or "".
  std::string run(Results& r) const {
    const Stored w(w_, c_.dtype), gamma(gamma_, c_.dtype), beta(beta_, c_.dtype);
    const Stored w_s1(w_s1_, c_.dtype), w_s2(w_s2_, c_.dtype), w_c(w_c_, w_c_dtype());
    RefineWeights weights = weights_of(c_);
    weights.w = any(w);
    weights.gamma = any(gamma);
    weights.beta = any(beta);
    if (c_.spatial) {
      weights.w_s1 = any(w_s1);
      weights.w_s2 = any(w_s2);
    }
    if (c_.channel) {
      weights.w_c = any(w_c);
    }
    std::string error = run_forward(r, weights);
    return error.empty() ? run_backward(r, weights) : error;
  }

  // CTAs of all clusters, and warps of one, of which there are as few as the sizes allow.
  int warps() const {
    return c_.d > 32 ? 2 : 1;
  }
  int ctas() const {
    int ctas = c_.clips / c_.launches;
    for (int channels = 16 * warps() * std::max(1, c_.multiple); channels < c_.channels; channels *= 2) {
      ctas *= 2;
    }
    return ctas;
  }

  // The forward by itself, and the backward of what the forward has saved.
  Judgement judge(const Results& r) const {
    const bool exact = c_.dtype == Dtype::float32 && c_.float32 != Float32::tf32;
    const double products = exact ? 2e-6 : c_.dtype == Dtype::bfloat16 ? 8e-3 : 1e-3;  // of operands of 8 or 11 bits
    const double stored = c_.dtype == Dtype::bfloat16 ? 4e-3 : c_.dtype == Dtype::float16 ? 5e-4 : 0;
    const double gate = products * std::min(1.0, 3 * c_.gate) + 3e-7;
    Judgement j;
    j.compare("features", r.features, wanted_.features, gate + stored);
    j.compare("strips", r.strips, wanted_.strips, gate);
    j.compare("mean", r.mean, wanted_.mean, 3 * products);
    j.compare("var", r.var, wanted_.var, 3 * products);
    j.compare("u", r.u, wanted_.u, products);
    if (c_.spatial) {
      j.compare("z_s", r.z_s, wanted_.z_s, 4 * products);
      j.compare("h", r.h, wanted_.h, 4 * products);
    }
    if (c_.channel) {
      j.compare("z_c", r.z_c, wanted_.z_c, 4 * products);
    }
    // A GPU's approximate exp and division, up to 14 ulp of a gate of logits to 10.
    const double gradients = 2 * products + (dev::adversary().noise == 0 ? 0 : 4e-6);
    const Results wanted = backward(r);
    j.compare("d_x", r.d_x, wanted.d_x, products / 2 + stored);
    for (const auto& [name, got, of] :
         {std::tuple("du", &r.du, &wanted.du), {"d_z_s", &r.d_z_s, &wanted.d_z_s}, {"d_z_c", &r.d_z_c, &wanted.d_z_c},
          {"d_h", &r.d_h, &wanted.d_h}, {"d_beta", &r.d_beta, &wanted.d_beta},
          {"d_gamma", &r.d_gamma, &wanted.d_gamma}}) {
      j.compare(name, *got, *of, gradients);
    }
    if (c_.twins && dev::adversary().noise == 0 && j.worst < 1) {  // channels of different CTAs, the same arithmetic
      for (int i = 0; i < c_.clips * c_.frames; i++) {
        for (const std::vector<float>* maps : {&r.features, &r.d_x}) {
          const float* first = maps->data() + i * c_.channels * p_;
          if (!std::equal(first, first + c_.channels * p_ / 2, first + c_.channels * p_ / 2)) {
            j.text += ", twin channels differ";
            j.worst = INFINITY;
            return j;
          }
        }
      }
    }
    j.compare("y_channels", r.y_channels, wanted.y_channels, 2e-6);
    j.compare("y_positions", r.y_positions, wanted.y_positions, 2e-6);
    return j;
  }

 private:
  template <class A>
  void set_sizes(A& a) const {
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
    a.groups = c_.groups;
    a.eps = 1e-3f;
  }

  // Runs a pass with scratch and packed weights, under the adversary if it is meant; sets the sums of the scratch.
  template <class A, class F>
  std::string with_scratch(
      A& a, RefineWeights weights, Pass pass, const ClusterLaunch& launch, std::vector<float>& sums, F run) const {
    weights.pass = pass;
    weights.multiple = launch.multiple;
    std::vector<dev::float4> packed(emulated::refine_packed_bytes(weights) / 16);
    std::memset(static_cast<void*>(packed.data()), 0xff, packed.size() * 16);
    std::vector<uint32_t> flags(c_.clips * 16 * 32);
    std::vector<dev::float4> aligned(launch.sums / 4 + 1, {NAN, NAN, NAN, NAN});
    std::vector<float> strips(launch.strips, NAN);
    a.packed = packed.data();
    a.scratch = {&aligned[0].x, flags.data(), strips.data()};
    dev::Adversary& adversary = dev::adversary();
    const dev::Adversary meant = adversary;
    if (!only.empty() && only != (pass == Pass::forward ? "forward" : "backward")) {
      adversary = {};
      adversary.notes = false;
    }
    std::string error = error_of([&] {
      emulated::refine_pack(weights, packed.data(), 0, nullptr);
      run();
    });
    adversary = meant;
    sums.assign(&aligned[0].x, &aligned[0].x + launch.sums);
    return error;
  }

  std::string run_forward(Results& r, const RefineWeights& weights) const {
    r.strips.assign(c_.clips * c_.channels * c_.height, NAN);
    r.mean.assign(c_.frames * c_.groups * c_.d, NAN);
    r.var = r.mean;
    r.z_s.assign(n_ * c_.clips * p_, NAN);
    r.z_c.assign(n_ * c_.clips * c_.channels, NAN);
    r.h.assign(n_ * c_.clips * c_.num_attn, NAN);
    r.u = motion();
    const Padded x(*this, x_);
    Padded features(*this, std::vector<float>(x_.size(), NAN));
    RefineForward a{};
    set_sizes(a);
    a.x = x.maps();
    a.u = c_.motion ? r.u.data() : nullptr;
    a.u_out = r.u.data();
    a.mean = r.mean.data();
    a.var = r.var.data();
    a.features = features.data();
    a.strips = r.strips.data();
    a.z_s = c_.spatial ? r.z_s.data() : nullptr;
    a.z_c = c_.channel ? r.z_c.data() : nullptr;
    a.h = c_.spatial ? r.h.data() : nullptr;
    ClusterLaunch launch{};
    std::string error = emulated::refine_forward_lacks(a, 0, c_.multiple, &launch);
    if (!error.empty() || launch.launches != c_.launches) {
      return "not launched as it should be: " + error;
    }
    std::vector<float> sums;
    error = with_scratch(
        a, weights, Pass::forward, launch, sums, [&] { emulated::refine_forward(a, launch, 0, nullptr); });
    r.features = features.values();
    return error;
  }

  std::string run_backward(Results& r, const RefineWeights& weights) const {
    const Padded x(*this, x_), features(*this, r.features), d_features(*this, d_features_);
    Padded d_x(*this, std::vector<float>(x_.size(), NAN));
    r.du.assign(r.u.size(), NAN);
    r.d_z_s.assign(r.z_s.size(), NAN);
    r.d_z_c.assign(r.z_c.size(), NAN);
    r.d_h.assign(r.h.size(), NAN);
    r.y_channels.assign(n_ * c_.clips * c_.d, NAN);
    RefineBackward a{};
    set_sizes(a);
    a.x = x.maps();
    a.features = features.maps();
    a.d_features = c_.d_features ? d_features.maps() : Maps{};
    a.d_strips = c_.d_strips ? d_strips_.data() : nullptr;
    a.u = r.u.data();
    a.mean = r.mean.data();
    a.var = r.var.data();
    a.z_s = c_.spatial ? r.z_s.data() : nullptr;
    a.z_c = c_.channel ? r.z_c.data() : nullptr;
    a.h = c_.spatial ? r.h.data() : nullptr;
    a.d_x = d_x.data();
    a.du = r.du.data();
    a.d_z_s = c_.spatial ? r.d_z_s.data() : nullptr;
    a.d_z_c = c_.channel ? r.d_z_c.data() : nullptr;
    a.d_h = c_.spatial ? r.d_h.data() : nullptr;
    a.y_channels = r.y_channels.data();
    ClusterLaunch launch{};
    std::string error = emulated::refine_backward_lacks(a, 0, c_.multiple, &launch);
    if (!error.empty()) {
      return error;
    }
    std::vector<float> parts(n_ * c_.clips * launch.ctas * p_, NAN), sums;
    a.y_positions = parts.data();
    error = with_scratch(
        a, weights, Pass::backward, launch, sums, [&] { emulated::refine_backward(a, launch, 0, nullptr); });
    r.d_x = d_x.values();
    r.y_positions.assign(n_ * c_.clips * p_, 0);
    for (size_t i = 0; i < parts.size(); i++) {
      r.y_positions[i / p_ / launch.ctas * p_ + i % p_] += parts[i];
    }
    const int rows = launch.threads;  // kD
    r.d_beta.clear();
    r.d_gamma.clear();
    for (int i = 0; i < n_ * c_.clips * c_.d; i++) {
      r.d_beta.push_back(sums[2 * (i / c_.d * rows + i % c_.d)]);
      r.d_gamma.push_back(sums[2 * (i / c_.d * rows + i % c_.d) + 1]);
    }
    return error;
  }

  // Maps as the kernels take them: rows of a multiple of 8 positions, addresses of 16 bytes.
  class Padded {
   public:
    Padded(const TrainingTest& test, const std::vector<float>& from) : t_(test) {
      const int apart = t_.c_.strided ? 1 : 0;
      frame_ = static_cast<int64_t>(t_.c_.channels + apart) * t_.row_;
      clip_ = frame_ * (t_.c_.frames + apart);
      std::vector<float> all(t_.c_.clips * clip_);
      for (size_t i = 0; i < from.size(); i++) {
        all[at(i)] = from[i];
      }
      const int size = t_.c_.dtype == Dtype::float32 ? 4 : 2;
      const Stored stored(all, t_.c_.dtype);
      memory_.resize(all.size() * size / 16);
      std::memcpy(static_cast<void*>(memory_.data()), stored.data(), all.size() * size);
    }
    Maps maps() const {
      return {memory_.data(), clip_, frame_, t_.row_, 1};
    }
    // Written by a kernel, and so contiguous.
    void* data() {
      frame_ = static_cast<int64_t>(t_.c_.channels) * t_.row_;
      clip_ = frame_ * t_.c_.frames;
      return memory_.data();
    }
    std::vector<float> values() const {
      std::vector<float> to(t_.maps_ * t_.p_);
      const auto* floats = reinterpret_cast<const float*>(memory_.data());
      const auto* halves = reinterpret_cast<const uint16_t*>(memory_.data());
      for (size_t i = 0; i < to.size(); i++) {
        to[i] = t_.c_.dtype == Dtype::float32 ? floats[at(i)] : widen(halves[at(i)], t_.c_.dtype);
      }
      return to;
    }

   private:
    int64_t at(size_t i) const {
      const int64_t p = i % t_.p_, c = i / t_.p_ % t_.c_.channels, t = i / t_.p_ / t_.c_.channels % t_.c_.frames;
      return i / t_.p_ / t_.c_.channels / t_.c_.frames * clip_ + t * frame_ + c * t_.row_ + p;
    }

    const TrainingTest& t_;
    int64_t clip_, frame_;
    std::vector<dev::float4> memory_;
  };

  Dtype w_c_dtype() const {
    return c_.float_w_c ? Dtype::float32 : c_.dtype;
  }
  int map_at(int clip, int t, int c, int p) const {
    return ((clip * c_.frames + t) * c_.channels + c) * p_ + p;
  }
  double w(int d, int c) const {
    return w_[d * 2 * c_.channels + c];
  }

  // W_m M_t of all steps, (N, B, D, P).
  std::vector<float> motion() const {
    std::vector<float> u(n_ * c_.clips * c_.d * p_, NAN);
    for (size_t i = 0; i < u.size() && c_.motion; i++) {
      const int p = i % p_, d = i / p_ % c_.d, clip = i / p_ / c_.d % c_.clips, t = 1 + i / p_ / c_.d / c_.clips;
      double sum = 0;
      for (int c = 0; c < c_.channels; c++) {
        sum += w(d, c_.channels + c) * (static_cast<double>(x_[map_at(clip, t, c, p)]) - x_[map_at(clip, t - 1, c, p)]);
      }
      u[i] = static_cast<float>(sum);
    }
    return u;
  }

  // Sets Y (B, D, P), and Uhat, of one step.
  void normalize(int t, const std::vector<double>& u, const std::vector<double>& mean, const std::vector<double>& var,
                 std::vector<double>& uhat, std::vector<double>& y) const {
    for (int i = 0; i < c_.clips * c_.d * p_; i++) {
      const int d = i / p_ % c_.d, group = i / p_ / c_.d / (c_.clips / c_.groups);
      const int at = (t * c_.groups + group) * c_.d + d;
      uhat[i] = (u[i] - mean[at]) / std::sqrt(var[at] + static_cast<double>(1e-3f));
      y[i] = std::max(0.0, gamma_[d] * uhat[i] + beta_[d]);
    }
  }

  Results forward() const {
    const int clips = c_.clips, channels = c_.channels, size = clips * c_.d * p_;
    Results r;
    r.features.assign(x_.size(), 0);
    r.mean.assign(c_.frames * c_.groups * c_.d, NAN);
    r.var = r.mean;
    r.u = motion();
    r.z_s.assign(n_ * clips * p_, NAN);
    r.z_c.assign(n_ * clips * channels, NAN);
    r.h.assign(n_ * clips * c_.num_attn, NAN);
    std::vector<double> s(clips * channels * p_), strips(clips * channels * c_.height), u(size), uhat(size), y(size);
    std::vector<double> mean(r.mean.size()), var(r.mean.size());
    for (int t = 0; t < c_.frames; t++) {
      const auto a = [&](int clip, int c, int p) {
        return static_cast<double>(x_[map_at(clip, t, c, p)]) - s[(clip * channels + c) * p_ + p];
      };
      for (int i = 0; i < size && t > 0; i++) {
        const int p = i % p_, d = i / p_ % c_.d, clip = i / p_ / c_.d, at = (t - 1) * size + i;
        u[i] = c_.motion ? r.u[at] : 0;
        for (int c = 0; c < channels; c++) {
          u[i] += w(d, c) * a(clip, c, p);
        }
        r.u[at] = static_cast<float>(u[i]);
      }
      for (int i = 0; i < c_.groups * c_.d && t > 0; i++) {
        const int of_group = clips / c_.groups, first = i / c_.d * of_group;
        const int d = i % c_.d, at = t * c_.groups * c_.d + i;
        double sum = 0, square = 0;
        for (int j = 0; j < of_group * p_; j++) {
          sum += u[((first + j / p_) * c_.d + d) * p_ + j % p_];
        }
        mean[at] = sum / (of_group * p_);
        for (int j = 0; j < of_group * p_; j++) {
          square += std::pow(u[((first + j / p_) * c_.d + d) * p_ + j % p_] - mean[at], 2);
        }
        var[at] = square / (of_group * p_);
        r.mean[at] = static_cast<float>(mean[at]);
        r.var[at] = static_cast<float>(var[at]);
      }
      if (t > 0) {
        normalize(t, u, mean, var, uhat, y);
      }
      for (int clip = 0; clip < clips; clip++) {
        std::vector<double> z_s(p_, 1), z_c(channels, 1);
        if (t > 0) {
          attend(r, y.data() + clip * c_.d * p_, (t - 1) * clips + clip, z_s, z_c);
        }
        for (int i = 0; i < channels * p_; i++) {
          double& own = s[clip * channels * p_ + i];
          own += a(clip, i / p_, i % p_) * (t == 0 ? 1 : 1 / (1 + std::exp(-z_c[i / p_] * z_s[i % p_])));
          r.features[map_at(clip, t, 0, 0) + i] = static_cast<float>(own);
          strips[(clip * channels + i / p_) * c_.height + i % p_ / c_.width] += own;
        }
      }
    }
    r.strips.assign(strips.begin(), strips.end());
    return r;
  }

  // Attention of one clip's Y (D, P).
  void attend(Results& r, const double* y, int at, std::vector<double>& z_s, std::vector<double>& z_c) const {
    std::vector<double> pooled(p_), means(c_.d), h(c_.num_attn);
    for (int i = 0; i < c_.d * p_; i++) {
      pooled[i % p_] += y[i] / c_.d;
      means[i / p_] += y[i] / p_;
    }
    for (int i = 0; i < c_.num_attn && c_.spatial; i++) {
      for (int p = 0; p < p_; p++) {
        h[i] += w_s1_[i * p_ + p] * pooled[p];
      }
      h[i] = std::max(0.0, h[i]);
      r.h[at * c_.num_attn + i] = static_cast<float>(h[i]);
    }
    for (int p = 0; p < p_ && c_.spatial; p++) {
      z_s[p] = 0;
      for (int i = 0; i < c_.num_attn; i++) {
        z_s[p] += w_s2_[p * c_.num_attn + i] * h[i];
      }
      r.z_s[at * p_ + p] = static_cast<float>(z_s[p]);
    }
    for (int c = 0; c < c_.channels && c_.channel; c++) {
      z_c[c] = 0;
      for (int d = 0; d < c_.d; d++) {
        z_c[c] += w_c_[c * c_.d + d] * means[d];
      }
      r.z_c[at * c_.channels + c] = static_cast<float>(z_c[c]);
    }
  }

  Results backward(const Results& saved) const {
    const int clips = c_.clips, channels = c_.channels, size = clips * c_.d * p_;
    Results r;
    r.d_x.assign(x_.size(), 0);
    r.du.assign(saved.u.size(), 0);
    r.d_z_s.assign(saved.z_s.size(), NAN);
    r.d_z_c.assign(saved.z_c.size(), NAN);
    r.d_h.assign(saved.h.size(), NAN);
    r.y_channels.assign(n_ * clips * c_.d, 0);
    r.y_positions.assign(n_ * clips * p_, 0);
    r.d_beta.assign(n_ * clips * c_.d, 0);
    r.d_gamma = r.d_beta;
    const std::vector<double> mean(saved.mean.begin(), saved.mean.end()), var(saved.var.begin(), saved.var.end());
    std::vector<double> carry(clips * channels * p_), g(carry.size()), d_y(size), uhat(size), y(size);
    for (int t = n_; t >= 0; t--) {
      for (int i = 0; i < clips * channels * p_; i++) {
        const int p = i % p_, c = i / p_ % channels, clip = i / p_ / channels;
        g[i] = carry[i] + (c_.d_features ? d_features_[map_at(clip, t, c, p)] : 0) +
            (c_.d_strips ? d_strips_[(clip * channels + c) * c_.height + p / c_.width] : 0);
        r.d_x[map_at(clip, t, c, p)] = static_cast<float>(g[i]);
      }
      if (t == 0) {
        break;
      }
      const std::vector<double> u(saved.u.begin() + (t - 1) * size, saved.u.begin() + t * size);
      normalize(t, u, mean, var, uhat, y);
      for (int clip = 0; clip < clips; clip++) {
        const int at = (t - 1) * clips + clip;
        std::vector<double> d_z_s(p_), d_z_c(channels), d_h(c_.num_attn), a(p_), b(c_.d);
        for (int i = 0; i < channels * p_; i++) {
          const int c = i / p_, p = i % p_;
          const double z_s = c_.spatial ? saved.z_s[at * p_ + p] : 1;
          const double z_c = c_.channel ? saved.z_c[at * channels + c] : 1;
          const double z = 1 / (1 + std::exp(-z_c * z_s)), own = g[clip * channels * p_ + i];
          const double difference =
              static_cast<double>(x_[map_at(clip, t, c, p)]) - saved.features[map_at(clip, t - 1, c, p)];
          const double d_logit = own * difference * z * (1 - z);
          d_z_s[p] += d_logit * z_c;
          d_z_c[c] += d_logit * z_s;
          carry[clip * channels * p_ + i] = (1 - z) * own;
        }
        for (int p = 0; p < p_ && c_.spatial; p++) {
          r.d_z_s[at * p_ + p] = static_cast<float>(d_z_s[p]);
        }
        for (int i = 0; i < c_.num_attn && c_.spatial; i++) {
          for (int p = 0; p < p_; p++) {
            d_h[i] += saved.h[at * c_.num_attn + i] > 0 ? w_s2_[p * c_.num_attn + i] * d_z_s[p] : 0;
          }
          for (int p = 0; p < p_; p++) {
            a[p] += w_s1_[i * p_ + p] * d_h[i] / c_.d;
          }
          r.d_h[at * c_.num_attn + i] = static_cast<float>(d_h[i]);
        }
        for (int c = 0; c < channels && c_.channel; c++) {
          r.d_z_c[at * channels + c] = static_cast<float>(d_z_c[c]);
          for (int d = 0; d < c_.d; d++) {
            b[d] += w_c_[c * c_.d + d] * d_z_c[c] / p_;
          }
        }
        for (int i = 0; i < c_.d * p_; i++) {
          const int d = i / p_, p = i % p_, whole = clip * c_.d * p_ + i;
          d_y[whole] = y[whole] > 0 ? a[p] + b[d] : 0;
          r.y_channels[at * c_.d + d] += static_cast<float>(y[whole] / p_);
          r.y_positions[at * p_ + p] += static_cast<float>(y[whole]);
          r.d_beta[at * c_.d + d] += static_cast<float>(d_y[whole]);
          r.d_gamma[at * c_.d + d] += static_cast<float>(d_y[whole] * uhat[whole]);
        }
      }
      norm_backward(r, t, d_y, uhat, var);
      for (int i = 0; i < clips * channels * p_; i++) {
        const int p = i % p_, c = i / p_ % channels, clip = i / p_ / channels;
        double e = 0;
        for (int d = 0; d < c_.d; d++) {
          e += w(d, c) * r.du[(((t - 1) * clips + clip) * c_.d + d) * p_ + p];
        }
        r.d_x[map_at(clip, t, c, p)] = static_cast<float>(g[i] - carry[i] + e);
        carry[i] -= e;
      }
    }
    return r;
  }

  // dU of a step.
  void norm_backward(Results& r, int t, const std::vector<double>& d_y, const std::vector<double>& uhat,
                     const std::vector<double>& var) const {
    const int of_group = c_.clips / c_.groups, size = c_.clips * c_.d * p_;
    for (int i = 0; i < c_.groups * c_.d; i++) {
      const int d = i % c_.d, first = i / c_.d * of_group, count = of_group * p_;
      double sum = 0, sum_uhat = 0;
      const auto at = [&](int j) { return ((first + j / p_) * c_.d + d) * p_ + j % p_; };
      for (int j = 0; j < count; j++) {
        sum += d_y[at(j)];
        sum_uhat += d_y[at(j)] * uhat[at(j)];
      }
      const double scale = gamma_[d] / std::sqrt(var[t * c_.groups * c_.d + i] + static_cast<double>(1e-3f));
      for (int j = 0; j < count; j++) {
        r.du[(t - 1) * size + at(j)] =
            static_cast<float>(scale * (d_y[at(j)] - sum / count - uhat[at(j)] * sum_uhat / count));
      }
    }
  }

  const TrainingCase c_;
  const int p_, row_, n_, maps_;
  Random random_;
  std::vector<float> x_, d_features_, d_strips_, w_, gamma_, beta_, w_s1_, w_s2_, w_c_;
  Results wanted_;
};
