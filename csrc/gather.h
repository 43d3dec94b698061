// Reads tracks of different lengths from one file into a padded batch. Knows bytes and rows, not models.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace attr_engine {

// What went wrong in Gather. what() is one sentence; where it concerns one track it starts with "track i: ",
// with i the index of the track in the call.
class GatherError : public std::runtime_error {
 public:
  enum class Kind {
    kArgument,  // an argument that is wrong in itself or does not fit the file
    kRead,      // the operating system could not read, or the file became shorter while being read
    kChecksum,  // the bytes were read but are not those that were checksummed
  };

  GatherError(Kind kind, std::optional<size_t> track, const std::string& sentence, int error_number = 0);

  Kind kind() const { return kind_; }
  std::optional<size_t> track() const { return track_; }
  // The errno of a failed read; 0 for everything else.
  int error_number() const { return error_number_; }

 private:
  Kind kind_;
  std::optional<size_t> track_;
  int error_number_;
};

// One call of Gather. It owns its lists, so that nobody changes them between check and use; the memory behind
// `out` and `pad_row` and the file descriptor belong to the caller and must outlive the call.
struct GatherRequest {
  int fd = -1;              // open for reading, a regular file; its position is neither used nor moved
  int64_t data_offset = 0;  // byte of the file at which row 0 starts
  int64_t row_bytes = 0;    // bytes of one row, at least 1

  std::vector<int64_t> starts;   // first row of each track
  std::vector<int64_t> lengths;  // rows of each track, 0 to `frames`

  uint8_t* out =
      nullptr;           // [tracks, frames, row_bytes]: track i, then its padding, at i * frames * row_bytes
  size_t out_bytes = 0;  // size of `out`: exactly tracks * frames * row_bytes
  int64_t frames = 0;    // rows that each track is padded to, at least 1

  const uint8_t* pad_row = nullptr;                // row_bytes bytes that fill the padding, or null for zeros
  std::optional<std::vector<uint32_t>> checksums;  // CRC-32C of the bytes of each track, or none to skip it
};

// pread(2), or what a test puts in its place.
using ReadFunction = ssize_t (*)(int fd, void* buffer, size_t size, off_t offset);

// Fills `request.out`. All arguments are checked against each other and against the size of the file before
// the first byte of `out` is written; after an exception from the reading itself the content of `out` is
// unspecified. Short reads and EINTR are carried on from. Tracks are read in order and the first that fails
// is reported. Thread-safe, also for calls that share a file descriptor. Throws GatherError, std::bad_alloc.
void Gather(const GatherRequest& request, ReadFunction read = ::pread);

}  // namespace attr_engine
