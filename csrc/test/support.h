// What the standalone checks of csrc share: a writer of small shards, random data sets and plans, and the
// slow gather that every batch is compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "convert.h"
#include "error.h"
#include "shards.h"
#include "stream.h"

// Ends the process: a check that fails leaves threads and files behind, of which the sanitizers would
// complain.
#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      (void)std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                                     \
    }                                                                                    \
  } while (false)

namespace attr_engine::test {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

int64_t Pick(Random& random, int64_t low, int64_t high);
bool OneIn(Random& random, int64_t n);

// A file of its own in the folder for temporary files, removed at the end.
class File {
 public:
  File();
  explicit File(const Bytes& content);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  void Write(const Bytes& content) const;
  void Truncate(int64_t size) const;

 private:
  std::string path_;
  int fd_;
};

struct Tensor {
  TensorSpec spec;
  std::vector<int64_t> shape;
  Bytes data;
};

// A safetensors file; `spaces` are appended to its header.
Bytes ShardBytes(const std::vector<Tensor>& tensors, size_t spaces);

// Any float, or only such as every float dtype can hold.
enum class Floats { kAny, kModest };
Bytes RandomItems(Random& random, const std::string& dtype, int64_t items, Floats floats);

// Shards on disk and the tracks in them: latents of a float dtype, raw sequences of int64 (some without rows)
// and vectors of one row.
class DataSet {
 public:
  // `wide`: tracks of some hundred KiB, so that they are read in several pieces by several threads.
  DataSet(Random& random, bool wide, Floats floats);

  struct Track {
    int32_t shard;
    std::vector<int64_t> start;  // [tensors]
    std::vector<int64_t> rows;   // [tensors]
  };

  std::shared_ptr<ShardSet> Open(bool map, ReadFunction read = ::pread) const;
  std::vector<TensorSpec> Specs() const;
  const uint8_t* Row(size_t tensor, int32_t shard, int64_t row) const;

  std::vector<std::vector<Tensor>> shards;
  std::vector<std::unique_ptr<File>> files;
  std::vector<int64_t> sizes;
  std::vector<Track> tracks;
};

// A plan over a data set, and the memory for it. The memory is exactly as long as needed, so that the address
// sanitizer sees the first byte beyond.
struct Job {
  Job(Random& random, const DataSet& data, size_t slots, Floats floats);

  std::shared_ptr<Ring> MakeRing();
  int64_t First(int64_t batch) const { return batch == 0 ? 0 : plan.ends[static_cast<size_t>(batch) - 1]; }
  int64_t batches() const { return static_cast<int64_t>(plan.ends.size()); }
  // The block of one field in one batch, built row by row from the content of the files.
  Bytes Expected(size_t field, int64_t batch) const;
  bool IsRight(const uint8_t* slot, int64_t batch) const;

  const DataSet& data;
  Plan plan;
  size_t slot_bytes = 0;
  Bytes memory;
};

// The next batch or the end, however long it takes.
Stream::Result Await(Stream& stream);

// What the stream throws in place of its next batch; the batches before it are released.
std::optional<ReadError> Failure(Stream& stream, Ring& ring, int64_t* delivered = nullptr);

// Casts one number by arithmetic on its value, not on its bits.
void SlowCast(uint8_t* out, DType to, const uint8_t* in, DType from);

// The checks; each ends the process where one fails.
void CheckBytes(Random& random);    // bytes.cpp
void CheckStreams(Random& random);  // streams.cpp
void CheckFaults(Random& random);   // faults.cpp
void CheckHostile(Random& random);  // faults.cpp

}  // namespace attr_engine::test
