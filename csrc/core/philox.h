// Random numbers without a state: Philox4x32-10 (Salmon et al., SC 2011) turns a key and a counter into 128 random bits.
#pragma once

#include <cstdint>

#include "platform.h"

namespace igb {

struct Random4 {
  std::uint32_t words[4];
};

// stream and step tell apart what uses one seed: a step of training, a task, a block of four elements.
IGB_HD inline Random4 philox(std::uint64_t seed, std::uint64_t step, std::uint64_t stream) {
  std::uint32_t key0 = std::uint32_t(seed), key1 = std::uint32_t(seed >> 32);
  Random4 x{{std::uint32_t(stream), std::uint32_t(stream >> 32), std::uint32_t(step), std::uint32_t(step >> 32)}};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = 0xD2511F53ull * x.words[0], product1 = 0xCD9E8D57ull * x.words[2];
    x = {{std::uint32_t(product1 >> 32) ^ x.words[1] ^ key0, std::uint32_t(product1),
          std::uint32_t(product0 >> 32) ^ x.words[3] ^ key1, std::uint32_t(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

// Uniform in (0, 1), never 0 or 1.
IGB_HD inline double uniform(std::uint32_t word) { return (word + 0.5) * (1.0 / 4294967296.0); }

}  // namespace igb
