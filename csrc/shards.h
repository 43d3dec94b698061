// The files of a data set: opened when they are needed, checked before they are used, read without signals.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"

namespace attr_engine {

// One tensor that every shard must have; a row is its smallest unit.
struct TensorSpec {
  std::string name;
  std::string dtype;
  int64_t row_items = 0;  // items of one row, at least 1
};

struct ShardSpec {
  std::string path;   // opened without following a symbolic link in its last part
  int64_t bytes = 0;  // size of the file, from the manifest
};

// pread(2), or what a test puts in its place.
using ReadFunction = ssize_t (*)(int fd, void* buffer, size_t size, off_t offset);

// An open shard. Immutable; any number of threads may read from it.
class Shard {
 public:
  // Opens and checks the file. Throws ReadError with `index` as the shard.
  Shard(int64_t index, const ShardSpec& spec, const std::vector<TensorSpec>& tensors, bool map,
        ReadFunction read);
  ~Shard();
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  int64_t rows(size_t tensor) const { return tensors_[tensor].rows; }

  // Reads `size` bytes from byte `offset` of a tensor, which must lie in it. A file that became shorter is a
  // ReadError, also where it is mapped: bytes are copied from the map by the kernel, which answers EFAULT
  // where a plain copy would be killed by SIGBUS.
  void Read(int64_t track, size_t tensor, int64_t offset, void* out, size_t size) const;

 private:
  struct Place {
    int64_t offset;  // of the tensor's first byte in the file
    int64_t rows;
  };

  [[noreturn]] void Fail(ReadError::Kind kind, int64_t track, const std::string& sentence) const;
  void ReadHeader(const ShardSpec& spec, const std::vector<TensorSpec>& tensors);
  // Returns the bytes read, 0 where the file ends; throws where the operating system refuses.
  size_t ReadSome(int64_t track, void* out, size_t size, int64_t offset) const;

  int64_t index_;
  ReadFunction read_;
  int fd_ = -1;
  int64_t bytes_ = 0;
  const uint8_t* map_ = nullptr;
  std::vector<Place> tensors_;
};

// All shards of a data set. Thread-safe. At most kOpen files are open at a time, however many there are.
class ShardSet {
 public:
  static constexpr size_t kOpen = 64;

  ShardSet(std::vector<ShardSpec> shards, std::vector<TensorSpec> tensors, bool map,
           ReadFunction read = ::pread);

  size_t size() const { return shards_.size(); }
  const std::vector<TensorSpec>& tensors() const { return tensors_; }

  // Opens shard `index`, or returns it where it is open. Throws ReadError.
  std::shared_ptr<const Shard> Open(size_t index);

 private:
  std::vector<ShardSpec> shards_;
  std::vector<TensorSpec> tensors_;
  bool map_;
  ReadFunction read_;
  std::mutex mutex_;
  std::list<std::pair<size_t, std::shared_ptr<const Shard>>> open_;  // most recently used first
};

}  // namespace attr_engine
