// What the mutation driver and the fuzzers do with one hostile input. Whatever it is, it is refused by an
// exception of the documented kind or served; anything else ends the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "support.h"

namespace attr_engine::test {

// Parses a header and checks that what is accepted fits together. Returns whether it was accepted.
bool TryHeader(const uint8_t* text, size_t size, int64_t payload);

// Opens `file` as a shard and streams a plan whose numbers are taken from `numbers`. Returns the batches.
int TryShard(const File& at, const Bytes& file, const Bytes& numbers);

// Valid shards, small and of many kinds.
std::vector<Bytes> SeedShards(Random& random);

// Flips, inserts, deletes, copies, splices with `other`, writes numbers and words that matter.
void Mutate(Random& random, Bytes& bytes, const Bytes& other);

// The number in the first 8 bytes, and where the data begin; beyond the end where it is larger than the file.
size_t DataStart(const Bytes& file);

}  // namespace attr_engine::test
