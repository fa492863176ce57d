// The random bits are those that Random123 publishes for Philox4x32-10 (its kat_vectors).
#include "check.h"
#include "philox.h"

namespace {

bool gives(std::uint64_t seed, std::uint64_t step, std::uint64_t stream, const igb::Random4& expected) {
  const igb::Random4 found = igb::philox(seed, step, stream);
  return std::memcmp(found.words, expected.words, sizeof found.words) == 0;
}

}  // namespace

TEST(philox_has_the_published_answers) {
  const std::uint64_t ones = ~std::uint64_t(0);
  CHECK(gives(0, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
  CHECK(gives(ones, ones, ones, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
  // The counter's words are stream and step, the key's the seed, each with its low word first.
  CHECK(gives(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88, {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}

TEST(uniform_numbers_are_inside_the_unit_interval) {
  CHECK(igb::uniform(0) > 0.0);
  CHECK(igb::uniform(0xffffffff) < 1.0);
  CHECK_NEAR(igb::uniform(0x80000000), 0.5, 1e-9);
}
