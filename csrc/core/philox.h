// Random numbers without a state: Philox4x32-10 (Salmon et al., SC 2011) turns a key and a counter into 128 random bits.
#pragma once

#include <cstdint>

#include "platform.h"

namespace igb {

struct Random4 {
  std::uint32_t words[4];
};

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

// stream and step tell apart what uses one seed: a step of training, a task, a block of four elements.
IGB_HD inline Random4 philox(std::uint64_t seed, std::uint64_t step, std::uint64_t stream) {
  std::uint32_t key0 = std::uint32_t(seed), key1 = std::uint32_t(seed >> 32);
  Random4 x{{std::uint32_t(stream), std::uint32_t(stream >> 32), std::uint32_t(step), std::uint32_t(step >> 32)}};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t(kPhiloxMultiplier0) * x.words[0];
    const std::uint64_t product1 = std::uint64_t(kPhiloxMultiplier1) * x.words[2];
    x = {{std::uint32_t(product1 >> 32) ^ x.words[1] ^ key0, std::uint32_t(product1),
          std::uint32_t(product0 >> 32) ^ x.words[3] ^ key1, std::uint32_t(product0)}};
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return x;
}

// The stream of a column's elements 4i to 4i + 3, which each take one of its words, wherever they are worked on.
IGB_HD inline std::uint64_t element_stream(std::uint64_t column, std::uint64_t element) {
  return (column << 40) + element / 4;
}

// 2U - 1 for U uniform in (0, 1): an odd multiple of 2^-24, which a float holds, where U itself would have a bit more.
IGB_HD inline float signed_uniform(std::uint32_t word) {
  return float(std::int32_t(word >> 7 | 1u) - (1 << 24)) * (1.0f / (1 << 24));
}

// Uniform in (0, 1), never 0 or 1.
IGB_HD inline double uniform(std::uint32_t word) { return (word + 0.5) * (1.0 / 4294967296.0); }

}  // namespace igb
