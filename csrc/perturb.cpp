// Random points around prompt embeddings: their scalars, and their rows. Defined by
// realera_fast/ops/perturb_reference.py, and equal to it to the last bit.
//
// Noise is drawn where it is used, for the scalars and again for the rows, so that it needs no
// memory. Threads share blocks of tokens, of one sample each: sums of integers don't tell how they
// were divided.

#include "dispatch.h"
#include "noise.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace realera_fast {
namespace {

constexpr double kGuard = 1.0 / 65536;
constexpr int64_t kMostElements = int64_t{1} << 21;  // beyond it the sums could overflow
constexpr int64_t kBlockElements = 8192;             // work worth giving to a thread
constexpr int64_t kScaledElements = 1 << 20;         // embeddings held in float32 at once
constexpr int64_t kScalarsTogether = 256;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Half: return Kind::kHalf;
    default: STD_TORCH_CHECK(false, "embeddings: expected float32, bfloat16, float16 or float64");
  }
}

Tensor detached(const Tensor& tensor) { return call("aten::detach", "", tensor); }

// Embeddings whose columns lie one behind the other, and how their tokens make blocks.
class Prompts {
 public:
  explicit Prompts(const Tensor& embeddings) {
    STD_TORCH_CHECK(embeddings.dim() == 3, "embeddings: expected [c, t, d]");
    kind_ = kind_of(embeddings);
    concepts = embeddings.size(0);
    tokens = embeddings.size(1);
    width = embeddings.size(2);
    moving = std::max<int64_t>(tokens - 1, 0);
    elements = moving * width;
    STD_TORCH_CHECK(elements <= kMostElements, "embeddings: too many elements that move");
    tensor_ = detached(embeddings);
    if (width > 1 && tensor_.stride(2) != 1) tensor_ = torch::stable::contiguous(tensor_);
    data_ = static_cast<const char*>(tensor_.const_data_ptr());
    element_size_ = tensor_.element_size();
    block_ = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, width));
    blocks = std::max<int64_t>(1, (moving + block_ - 1) / block_);
  }

  ScalarType dtype() const { return tensor_.scalar_type(); }
  ScalarType exact() const {
    return kind_ == Kind::kDouble ? ScalarType::Double : ScalarType::Float;
  }
  int64_t row_bytes() const { return width * element_size_; }
  // Least number of blocks that are worth a thread of their own.
  int64_t grain() const {
    return std::max<int64_t>(1, kBlockElements / (1 + std::min(block_, moving) * width));
  }

  Rows rows(int64_t prompt, int64_t token, int64_t count) const {
    const int64_t place = prompt * tensor_.stride(0) + token * tensor_.stride(1);
    return {const_cast<char*>(data_) + place * element_size_, kind_, count, tensor_.stride(1), 1};
  }

  struct Block {
    int64_t token, count;
  };
  Block block(int64_t number) const {
    const int64_t start = number * block_;
    return {1 + start, std::min(block_, moving - start)};
  }

  int64_t concepts, tokens, width;
  int64_t moving;    // tokens of a prompt that move
  int64_t elements;  // and their elements
  int64_t blocks;    // blocks of a prompt

 private:
  Tensor tensor_;
  Kind kind_;
  const char* data_;
  int64_t element_size_;
  int64_t block_;
};

// Counters of all pairs of a prompt and a sample, the samples of a prompt one behind the other.
struct Pairs {
  uint64_t seed;
  int64_t samples, offset, concept_offset;

  Stream stream(int64_t pair) const {
    return {seed, static_cast<uint32_t>(offset + pair % samples),
            static_cast<uint32_t>(concept_offset + pair / samples)};
  }
};

Pairs pairs_of(int64_t seed, int64_t samples, int64_t offset, int64_t concept_offset) {
  return {static_cast<uint64_t>(seed), samples, offset, concept_offset};
}

// ---- Scalars ----------------------------------------------------------------------------------

struct Region {
  double min_cosine, max_cosine, max_distance;
};

double sine(double cosine) {
  return std::sqrt(std::max(0.0, (1.0 - cosine) * (1.0 + cosine)));
}

// A step of the accepted interval; NaN where that is empty.
double step(double parallel, double perpendicular, const Region& region, double uniform) {
  const double away = 1.0 - parallel;
  const auto reach = [=](double cosine) {
    const double denominator = perpendicular * cosine + away * sine(cosine);
    return denominator > 0 ? sine(cosine) / denominator : std::numeric_limits<double>::infinity();
  };
  const double distance = std::sqrt(perpendicular * perpendicular + away * away);
  const double nearest = region.max_cosine >= 1.0 ? 0.0 : reach(region.max_cosine);
  const double low = nearest * (1.0 + kGuard);
  const double high =
      std::min(region.max_distance / distance, reach(region.min_cosine)) * (1.0 - kGuard);
  return low <= high ? low + uniform * (high - low) : kNan;
}

// The first word of the counter (0, 0, sample, concept).
double step_uniform(const Stream& stream) {
  uint32_t key_a = static_cast<uint32_t>(stream.seed);
  uint32_t key_b = static_cast<uint32_t>(stream.seed >> 32);
  uint32_t c0 = 0, c1 = 0, c2 = stream.sample, c3 = stream.prompt;
  for (int round = 0; round < 10; ++round, key_a += kKeyA, key_b += kKeyB) {
    const uint64_t a = static_cast<uint64_t>(c0) * kRoundA;
    const uint64_t b = static_cast<uint64_t>(c2) * kRoundB;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key_a;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key_b;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  const uint32_t folded = c0 >> 31 != 0 ? ~c0 : c0;
  return static_cast<float>(folded) * kUniformScale;
}

double inner_scale(int64_t elements) {
  int bits = 0;
  for (int64_t rest = elements - 1; rest > 0; rest >>= 1) ++bits;
  return std::ldexp(1.0, 28 - (bits + 1) / 2);
}

// The power of two below a positive number; zero, infinity and NaN give zero or infinity.
double power_below(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= uint64_t{0x7FF} << 52;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

class Scalars {
 public:
  Scalars(const Prompts& prompts, const Pairs& pairs, const Region& region)
      : prompts_(prompts),
        pairs_(pairs),
        region_(region),
        product_scale_(inner_scale(prompts.elements)),
        most_(std::min(prompts.concepts,
                       std::max<int64_t>(1, kScaledElements / prompts.elements))),
        root_(most_),
        scaled_(torch::stable::empty({most_ * prompts.elements}, ScalarType::Float)) {}

  // Elements of alpha, beta and scale, whose type is S.
  template <class S>
  void compute(S* alpha, S* beta, S* scale) {
    for (first_ = 0; first_ < prompts_.concepts; first_ += most_) {
      count_ = std::min(most_, prompts_.concepts - first_);
      find_roots();
      add_moments();
      finish(alpha, beta, scale);
    }
  }

 private:
  // Calls `use(concept, block, index)` for all blocks of these prompts.
  template <class Use>
  void each_block(const Use& use) const {
    const int64_t blocks = prompts_.blocks;
    torch::stable::parallel_for(0, count_ * blocks, prompts_.grain(),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    use(i / blocks, prompts_.block(i % blocks), i);
                                  }
                                });
  }

  Rows rows(int64_t i, const Prompts::Block& block) const {
    return prompts_.rows(first_ + i, block.token, block.count);
  }

  // Root mean squares, and the embeddings in units of them.
  void find_roots() {
    const int64_t blocks = prompts_.blocks, width = prompts_.width;
    std::vector<double> largest(count_ * blocks), unit(count_);
    each_block([&](int64_t i, const Prompts::Block& block, int64_t index) {
      largest[index] = noise_kernels().largest(rows(i, block), width);
    });
    const auto good = [](double value) { return value > 0 && std::isfinite(value); };
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t k = i * blocks; k < (i + 1) * blocks; ++k) {
        const double power = power_below(largest[k]);
        // NaN became infinity.
        if (power > unit[i]) unit[i] = power;
      }
    }
    std::vector<uint64_t> sums(count_ * blocks);
    each_block([&](int64_t i, const Prompts::Block& block, int64_t index) {
      if (!good(unit[i])) return;
      sums[index] = noise_kernels().square_sum(rows(i, block), width, 1.0 / unit[i]);
    });
    for (int64_t i = 0; i < count_; ++i) {
      uint64_t sum = 0;
      for (int64_t k = i * blocks; k < (i + 1) * blocks; ++k) sum += sums[k];
      const double mean = static_cast<double>(static_cast<int64_t>(sum)) / kNormScale /
                          static_cast<double>(prompts_.elements);
      root_[i] = good(unit[i]) ? unit[i] * std::sqrt(mean) : kNan;
      // What is so small has no inverse.
      const double inverse = 1.0 / root_[i];
      const bool fits = prompts_.exact() == ScalarType::Double
                            ? std::isfinite(inverse)
                            : std::isfinite(static_cast<float>(inverse));
      if (!fits) root_[i] = kNan;
    }
    float* out = scaled_.mutable_data_ptr<float>();
    each_block([&](int64_t i, const Prompts::Block& block, int64_t) {
      if (std::isnan(root_[i])) return;
      noise_kernels().scaled(rows(i, block), width, 1.0 / root_[i],
                             static_cast<float>(product_scale_),
                             out + i * prompts_.elements + (block.token - 1) * width);
    });
  }

  void add_moments() {
    const int64_t samples = pairs_.samples, blocks = prompts_.blocks, width = prompts_.width;
    const int64_t start = first_ * samples, end = start + count_ * samples;
    const float* scaled = scaled_.const_data_ptr<float>();
    // One for each block of a pair.
    moments_.assign((end - start) * blocks, {0, 0});
    torch::stable::parallel_for(
        start * blocks, end * blocks, prompts_.grain(), [&](int64_t first, int64_t last) {
          for (int64_t k = first; k < last; ++k) {
            const int64_t pair = k / blocks, i = pair / samples - first_;
            if (std::isnan(root_[i])) continue;
            const Prompts::Block block = prompts_.block(k % blocks);
            const float* e = scaled + i * prompts_.elements + (block.token - 1) * width;
            moments_[k - start * blocks] =
                noise_kernels().moments(pairs_.stream(pair), block.token, block.count, width, e);
          }
        });
  }

  template <class S>
  void finish(S* alpha, S* beta, S* scale) const {
    const int64_t samples = pairs_.samples, blocks = prompts_.blocks;
    const int64_t start = first_ * samples;
    const double elements = static_cast<double>(prompts_.elements);
    torch::stable::parallel_for(
        start, start + count_ * samples, kScalarsTogether, [&](int64_t begin, int64_t end) {
          for (int64_t pair = begin; pair < end; ++pair) {
            Moments sum{0, 0};
            for (int64_t k = 0; k < blocks; ++k) {
              const Moments& part = moments_[(pair - start) * blocks + k];
              sum.inner += part.inner;
              sum.square += part.square;
            }
            const double inner = static_cast<double>(static_cast<int64_t>(sum.inner));
            const double square = static_cast<double>(static_cast<int64_t>(sum.square));
            const double parallel = inner / product_scale_ / elements;
            const double rest = square / kSquareScale / elements - parallel * parallel;
            const double root = root_[pair / samples - first_];
            double drawn = kNan;
            if (!std::isnan(root)) {
              drawn = step(parallel, std::sqrt(std::max(rest, 0.0)), region_,
                           step_uniform(pairs_.stream(pair)));
            }
            alpha[pair] = static_cast<S>(1.0 - drawn);
            beta[pair] = static_cast<S>(drawn);
            scale[pair] = static_cast<S>(static_cast<double>(beta[pair]) * root);
          }
        });
  }

  const Prompts& prompts_;
  const Pairs& pairs_;
  const Region region_;
  const double product_scale_;
  const int64_t most_;  // prompts at a time
  int64_t first_ = 0, count_ = 0;
  std::vector<double> root_;
  Tensor scaled_;
  std::vector<Moments> moments_;
};

std::tuple<Tensor, Tensor, Tensor> perturb(Tensor embeddings, int64_t samples, double min_cosine,
                                           double max_cosine, double max_distance, int64_t seed,
                                           int64_t offset, int64_t concept_offset) {
  STD_TORCH_CHECK(samples >= 0, "samples: expected a number of samples");
  const Prompts prompts(embeddings);
  const Pairs pairs = pairs_of(seed, samples, offset, concept_offset);
  const std::vector<int64_t> size{prompts.concepts, samples};
  Tensor alpha = torch::stable::empty(size, prompts.exact());
  Tensor beta = torch::stable::empty(size, prompts.exact());
  Tensor scale = torch::stable::empty(size, prompts.exact());
  if (prompts.elements == 0) {
    torch::stable::fill_(alpha, 1.0);
    torch::stable::zero_(beta);
    torch::stable::zero_(scale);
  } else if (prompts.concepts > 0 && samples > 0) {
    Scalars scalars(prompts, pairs, {min_cosine, max_cosine, max_distance});
    if (prompts.exact() == ScalarType::Double) {
      scalars.compute(alpha.mutable_data_ptr<double>(), beta.mutable_data_ptr<double>(),
                      scale.mutable_data_ptr<double>());
    } else {
      scalars.compute(alpha.mutable_data_ptr<float>(), beta.mutable_data_ptr<float>(),
                      scale.mutable_data_ptr<float>());
    }
  }
  return {alpha, beta, scale};
}

// ---- Rows -------------------------------------------------------------------------------------

class Writer {
 public:
  Writer(const Prompts& prompts, const Pairs& pairs, const Tensor& alpha, const Tensor& scale,
         char* out)
      : prompts_(prompts), pairs_(pairs), alpha_(alpha), scale_(scale), out_(out) {}

  // The rows of all pairs, so many.
  void write(int64_t count) const {
    const int64_t blocks = prompts_.blocks;
    torch::stable::parallel_for(
        0, count * blocks, prompts_.grain(), [&](int64_t first, int64_t last) {
          for (int64_t k = first; k < last; ++k) {
            const int64_t pair = k / blocks, prompt = pair / pairs_.samples;
            char* out = out_ + pair * prompts_.tokens * prompts_.row_bytes();
            if (k % blocks == 0) {
              std::memcpy(out, prompts_.rows(prompt, 0, 1).data, prompts_.row_bytes());
            }
            const Prompts::Block block = prompts_.block(k % blocks);
            noise_kernels().rows(
                pairs_.stream(pair), block.token, prompts_.width,
                prompts_.rows(prompt, block.token, block.count), element(alpha_, pair),
                element(scale_, pair), out + block.token * prompts_.row_bytes());
          }
        });
  }

 private:
  bool is_double() const { return prompts_.exact() == ScalarType::Double; }

  double element(const Tensor& tensor, int64_t i) const {
    return is_double() ? tensor.const_data_ptr<double>()[i] : tensor.const_data_ptr<float>()[i];
  }

  const Prompts& prompts_;
  const Pairs& pairs_;
  const Tensor &alpha_, &scale_;
  char* const out_;
};

Tensor scalars_of(const Tensor& tensor, const char* name, const Prompts& prompts,
                  int64_t samples) {
  check_matrix(tensor, name, prompts.concepts, samples);
  STD_TORCH_CHECK(tensor.scalar_type() == prompts.exact(), name,
                  ": wrong type; call it through realera_fast.ops");
  return torch::stable::contiguous(detached(tensor));
}

Tensor perturb_rows(Tensor embeddings, Tensor alpha, Tensor scale, int64_t seed, int64_t offset,
                    int64_t concept_offset) {
  const Prompts prompts(embeddings);
  check_matrix(alpha, "alpha", prompts.concepts, -1);
  const int64_t samples = alpha.size(1);
  const Tensor first = scalars_of(alpha, "alpha", prompts, samples);
  const Tensor second = scalars_of(scale, "scale", prompts, samples);
  const Pairs pairs = pairs_of(seed, samples, offset, concept_offset);
  Tensor rows = torch::stable::empty({prompts.concepts, samples, prompts.tokens, prompts.width},
                                     prompts.dtype());
  if (rows.numel() == 0) return rows;
  const Writer writer(prompts, pairs, first, second,
                      static_cast<char*>(rows.mutable_data_ptr()));
  writer.write(prompts.concepts * samples);
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("perturb_rows", TORCH_BOX(&perturb_rows));
}

}  // namespace realera_fast
