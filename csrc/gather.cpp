#include "gather.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "crc32c.h"

static_assert(sizeof(off_t) == 8,
              "files over 2 GiB need a 64-bit off_t: compile with -D_FILE_OFFSET_BITS=64");

namespace attr_engine {
namespace {

using Kind = GatherError::Kind;

// Read and checksummed in pieces of this size, so that the checksum finds its bytes in the L2 cache.
constexpr size_t kPiece = size_t{256} * 1024;

std::string Text(int64_t number) { return std::to_string(number); }

std::string Hex(uint32_t number) {
  char text[11];
  (void)std::snprintf(text, sizeof text, "0x%08" PRIx32, number);
  return text;
}

std::string SystemMessage(int error_number) { return std::generic_category().message(error_number); }

[[noreturn]] void Refuse(const std::string& sentence) {
  throw GatherError(Kind::kArgument, std::nullopt, sentence);
}

// Checks what can be checked without the file.
void CheckShape(const GatherRequest& request) {
  const size_t tracks = request.starts.size();
  if (request.lengths.size() != tracks) {
    Refuse("lengths has " + std::to_string(request.lengths.size()) + " items but starts has " +
           std::to_string(tracks));
  }
  if (request.checksums && request.checksums->size() != tracks) {
    Refuse("checksums has " + std::to_string(request.checksums->size()) + " items but starts has " +
           std::to_string(tracks));
  }
  if (request.data_offset < 0) {
    Refuse("data_offset is " + Text(request.data_offset) + ": it must not be negative");
  }
  if (request.row_bytes < 1) Refuse("row_bytes is " + Text(request.row_bytes) + ": it must be at least 1");
  if (request.frames < 1) Refuse("frames is " + Text(request.frames) + ": it must be at least 1");

  const std::string product = std::to_string(tracks) + " tracks x " + Text(request.frames) + " frames x " +
                              Text(request.row_bytes) + " bytes";
  int64_t track_bytes = 0;
  int64_t need = 0;
  if (__builtin_mul_overflow(request.frames, request.row_bytes, &track_bytes) ||
      __builtin_mul_overflow(static_cast<int64_t>(tracks), track_bytes, &need)) {
    Refuse(product + " do not fit in 64 bits");
  }
  if (request.out_bytes != static_cast<size_t>(need)) {
    Refuse("out has " + std::to_string(request.out_bytes) + " bytes but " + product + " need " + Text(need));
  }
}

// Returns the size of the file in bytes.
int64_t FileSize(int fd) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) {
    const int code = errno;
    throw GatherError(
        Kind::kRead, std::nullopt,
        "asking for the size of file descriptor " + Text(fd) + " failed: " + SystemMessage(code), code);
  }
  if (!S_ISREG(status.st_mode)) Refuse("file descriptor " + Text(fd) + " is not a regular file");
  return status.st_size;
}

// Checks every track against the file. Afterwards no offset computed from a track can overflow: each ends at
// or before the end of the file.
void CheckTracks(const GatherRequest& request) {
  const int64_t size = FileSize(request.fd);
  if (request.data_offset > size) {
    Refuse("data_offset is " + Text(request.data_offset) + " but the file has " + Text(size) + " bytes");
  }
  const int64_t rows = (size - request.data_offset) / request.row_bytes;
  for (size_t i = 0; i < request.starts.size(); ++i) {
    const int64_t start = request.starts[i];
    const int64_t length = request.lengths[i];
    const auto refuse = [i](const std::string& sentence) { throw GatherError(Kind::kArgument, i, sentence); };
    if (start < 0) refuse("its start is " + Text(start) + ": it must not be negative");
    if (length < 0) refuse("its length is " + Text(length) + ": it must not be negative");
    if (length > request.frames) {
      refuse("it has " + Text(length) + " rows but the batch has room for " + Text(request.frames));
    }
    if (start > rows || length > rows - start) {
      refuse(Text(length) + " rows from row " + Text(start) + " lie outside the file, which has " +
             Text(rows) + " rows of " + Text(request.row_bytes) + " bytes from byte " +
             Text(request.data_offset));
    }
  }
}

// Reads `size` bytes from byte `offset` of the file to `out` and returns their CRC-32C, or 0 where no
// `checksum` is wanted.
uint32_t ReadTrack(ReadFunction read, int fd, size_t track, uint8_t* out, int64_t size, int64_t offset,
                   bool checksum) {
  const int64_t end = offset + size;
  uint32_t crc = 0;
  while (offset < end) {
    const ssize_t got = read(fd, out, std::min(static_cast<size_t>(end - offset), kPiece), offset);
    if (got < 0) {
      const int code = errno;
      if (code == EINTR) continue;
      throw GatherError(Kind::kRead, track,
                        "reading at byte " + Text(offset) + " failed: " + SystemMessage(code), code);
    }
    if (got == 0) {
      throw GatherError(Kind::kRead, track,
                        "the file ends at byte " + Text(offset) + ", before byte " + Text(end) +
                            ": it became shorter while it was being read");
    }
    if (checksum) crc = Crc32c(out, static_cast<size_t>(got), crc);
    out += got;
    offset += got;
  }
  return crc;
}

// Fills `size` bytes at `out`, a whole number of rows, with copies of `pad_row` or with zeros.
void Pad(uint8_t* out, size_t size, const uint8_t* pad_row, size_t row_bytes) {
  if (size == 0) return;
  if (pad_row == nullptr) {
    std::memset(out, 0, size);
    return;
  }
  std::memcpy(out, pad_row, row_bytes);
  for (size_t filled = row_bytes; filled < size;) {  // each copy doubles what is filled
    const size_t step = std::min(filled, size - filled);
    std::memcpy(out + filled, out, step);
    filled += step;
  }
}

std::string WithTrack(std::optional<size_t> track, const std::string& sentence) {
  return track ? "track " + std::to_string(*track) + ": " + sentence : sentence;
}

}  // namespace

GatherError::GatherError(Kind kind, std::optional<size_t> track, const std::string& sentence,
                         int error_number)
    : std::runtime_error(WithTrack(track, sentence)),
      kind_(kind),
      track_(track),
      error_number_(error_number) {}

void Gather(const GatherRequest& request, ReadFunction read) {
  CheckShape(request);
  CheckTracks(request);
  const int64_t track_bytes = request.frames * request.row_bytes;
  for (size_t i = 0; i < request.starts.size(); ++i) {
    uint8_t* out = request.out + i * static_cast<size_t>(track_bytes);
    const int64_t size = request.lengths[i] * request.row_bytes;
    const int64_t offset = request.data_offset + request.starts[i] * request.row_bytes;
    const uint32_t crc = ReadTrack(read, request.fd, i, out, size, offset, request.checksums.has_value());
    if (request.checksums && crc != (*request.checksums)[i]) {
      throw GatherError(Kind::kChecksum, i,
                        "the " + Text(size) + " bytes from byte " + Text(offset) + " have the CRC-32C " +
                            Hex(crc) + " but " + Hex((*request.checksums)[i]) +
                            " was recorded: the file is damaged");
    }
    Pad(out + size, static_cast<size_t>(track_bytes - size), request.pad_row,
        static_cast<size_t>(request.row_bytes));
  }
}

}  // namespace attr_engine
