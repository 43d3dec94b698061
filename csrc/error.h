// The one exception of csrc. Numbers say where; Python turns them into names of files and tracks.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace attr_engine {

class ReadError : public std::runtime_error {
 public:
  enum class Kind {
    kArgument,    // an argument that is wrong in itself, or does not fit the others
    kMissing,     // there is no such file
    kUnreadable,  // the operating system refuses: permission, input/output error, not a regular file
    kTruncated,   // the file is shorter than it should be, or became shorter while being read
    kHeader,      // the file does not start with a valid header
    kMismatch,    // a valid shard, but not the one that the manifest describes
    kChecksum,    // the bytes were read but are not those that were checksummed
    kNonFinite,   // the bytes are right and hold NaN or infinity
    kStarved,     // every buffer of the ring is held by a batch that is still alive
    kClosed,      // the stream was closed, or belongs to the process that this one was forked from
  };

  static constexpr int64_t kNone = -1;

  // `shard` is an index in the ShardSet, `track` an index in the plan; kNone where it concerns none.
  ReadError(Kind kind, int64_t shard, int64_t track, const std::string& sentence)
      : std::runtime_error(sentence), kind_(kind), shard_(shard), track_(track) {}

  Kind kind() const { return kind_; }
  int64_t shard() const { return shard_; }
  int64_t track() const { return track_; }

 private:
  Kind kind_;
  int64_t shard_;
  int64_t track_;
};

}  // namespace attr_engine
