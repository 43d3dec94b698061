#include "shards.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "header.h"

static_assert(sizeof(off_t) == 8,
              "files over 2 GiB need a 64-bit off_t: compile with -D_FILE_OFFSET_BITS=64");

namespace attr_engine {
namespace {

using Kind = ReadError::Kind;

constexpr size_t kLengthBytes = 8;

std::string SystemMessage(int error_number) { return std::generic_category().message(error_number); }

std::string Text(int64_t number) { return std::to_string(number); }

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t items = 1;  // ParseHeader has checked that it does not overflow
  for (const int64_t size : shape) items *= size;
  return items;
}

}  // namespace

Shard::Shard(int64_t index, const ShardSpec& spec, const std::vector<TensorSpec>& tensors, bool map,
             ReadFunction read)
    : index_(index),
      read_(read),
      fd_(::open(spec.path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)) {
  if (fd_ < 0) {
    const int code = errno;
    Fail(code == ENOENT ? Kind::kMissing : Kind::kUnreadable, ReadError::kNone, SystemMessage(code));
  }
  try {
    ReadHeader(spec, tensors);
    if (map) {
      void* address = ::mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ, MAP_SHARED, fd_, 0);
      if (address == MAP_FAILED) {
        Fail(Kind::kUnreadable, ReadError::kNone, "it cannot be mapped: " + SystemMessage(errno));
      }
      map_ = static_cast<const uint8_t*>(address);
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

Shard::~Shard() {
  if (map_ != nullptr) ::munmap(const_cast<uint8_t*>(map_), static_cast<size_t>(bytes_));
  ::close(fd_);
}

void Shard::Fail(Kind kind, int64_t track, const std::string& sentence) const {
  throw ReadError(kind, index_, track, sentence);
}

void Shard::ReadHeader(const ShardSpec& spec, const std::vector<TensorSpec>& tensors) {
  constexpr int64_t kNone = ReadError::kNone;
  struct stat status{};
  if (::fstat(fd_, &status) != 0) Fail(Kind::kUnreadable, kNone, SystemMessage(errno));
  if (!S_ISREG(status.st_mode)) Fail(Kind::kUnreadable, kNone, "it is not a regular file");
  bytes_ = status.st_size;
  const std::string sizes = "it has " + Text(bytes_) + " bytes, " + Text(spec.bytes) + " were recorded";
  if (bytes_ < spec.bytes) Fail(Kind::kTruncated, kNone, sizes);
  if (bytes_ > spec.bytes) Fail(Kind::kMismatch, kNone, sizes);

  uint8_t head[kLengthBytes] = {};
  const auto fill = [&](void* out, size_t size, int64_t offset) {
    for (size_t done = 0; done < size;) {
      const size_t got = ReadSome(kNone, static_cast<uint8_t*>(out) + done, size - done,
                                  offset + static_cast<int64_t>(done));
      if (got == 0) Fail(Kind::kTruncated, kNone, "it ends in its header");
      done += got;
    }
  };
  fill(head, kLengthBytes, 0);
  uint64_t length = 0;
  for (size_t i = kLengthBytes; i-- > 0;) length = length << 8 | head[i];
  const int64_t room = bytes_ - static_cast<int64_t>(kLengthBytes);
  if (length == 0 || length > static_cast<uint64_t>(std::min(kMaxHeader, room))) {
    Fail(Kind::kHeader, kNone,
         "its length is given as " + std::to_string(length) + " bytes, the file has " + Text(bytes_));
  }
  std::string text(length, '\0');
  fill(text.data(), text.size(), static_cast<int64_t>(kLengthBytes));
  const auto data = static_cast<int64_t>(kLengthBytes + length);

  std::vector<TensorEntry> entries;
  try {
    entries = ParseHeader(text.data(), text.size(), bytes_ - data);
  } catch (const std::invalid_argument& error) {
    Fail(Kind::kHeader, kNone, error.what());
  }
  for (const TensorSpec& want : tensors) {
    const auto found = std::find_if(entries.begin(), entries.end(),
                                    [&](const TensorEntry& entry) { return entry.name == want.name; });
    if (found == entries.end()) Fail(Kind::kMismatch, kNone, "it has no tensor '" + want.name + "'");
    if (found->dtype != want.dtype) {
      Fail(Kind::kMismatch, kNone, "its '" + want.name + "' is " + found->dtype + ", not " + want.dtype);
    }
    const int64_t items = Product(found->shape);
    if (items % want.row_items != 0) {
      Fail(Kind::kMismatch, kNone,
           "its '" + want.name + "' has no rows of " + Text(want.row_items) + " items");
    }
    tensors_.push_back({data + found->begin, items / want.row_items});
  }
}

size_t Shard::ReadSome(int64_t track, void* out, size_t size, int64_t offset) const {
  for (;;) {
    ssize_t got = 0;
    if (map_ == nullptr) {
      got = read_(fd_, out, size, offset);
    } else {
      const iovec local{out, size};
      const iovec remote{const_cast<uint8_t*>(map_) + offset, size};
      got = ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0);
      if (got < 0 && errno == EFAULT) return 0;
      if (got > 0) {
        // The last page of a file that was cut in its middle reads as zeros, without an error.
        struct stat status{};
        if (::fstat(fd_, &status) != 0) Fail(Kind::kUnreadable, track, SystemMessage(errno));
        got = std::min<ssize_t>(got, std::max<int64_t>(0, status.st_size - offset));
      }
    }
    if (got >= 0) return static_cast<size_t>(got);
    const int code = errno;
    if (code == EINTR) continue;
    const bool forbidden = map_ != nullptr && (code == EPERM || code == ENOSYS);
    Fail(Kind::kUnreadable, track,
         forbidden
             ? "this system forbids to copy from a map safely (process_vm_readv): read with source='pread'"
             : "reading at byte " + Text(offset) + " failed: " + SystemMessage(code));
  }
}

void Shard::Read(int64_t track, size_t tensor, int64_t offset, void* out, size_t size) const {
  auto* to = static_cast<uint8_t*>(out);
  int64_t at = tensors_[tensor].offset + offset;
  const int64_t end = at + static_cast<int64_t>(size);
  while (at < end) {
    const size_t got = ReadSome(track, to, static_cast<size_t>(end - at), at);
    if (got == 0) {
      Fail(Kind::kTruncated, track,
           "it ends at or before byte " + Text(at) + ", before byte " + Text(end) +
               ": it became shorter while it was being read");
    }
    to += got;
    at += static_cast<int64_t>(got);
  }
}

ShardSet::ShardSet(std::vector<ShardSpec> shards, std::vector<TensorSpec> tensors, bool map,
                   ReadFunction read)
    : shards_(std::move(shards)), tensors_(std::move(tensors)), map_(map), read_(read) {
  for (const TensorSpec& tensor : tensors_) {
    if (ItemBytes(tensor.dtype) == 0 || tensor.row_items < 1) {
      throw ReadError(Kind::kArgument, ReadError::kNone, ReadError::kNone,
                      "tensor '" + tensor.name + "' needs a known dtype and rows of at least one item");
    }
  }
  for (const ShardSpec& shard : shards_) {
    if (shard.path.find('\0') != std::string::npos) {
      throw ReadError(Kind::kArgument, ReadError::kNone, ReadError::kNone, "a path holds a zero byte");
    }
  }
}

std::shared_ptr<const Shard> ShardSet::Open(size_t index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(open_.begin(), open_.end(), [index](const auto& item) { return item.first == index; });
  if (found != open_.end()) {
    open_.splice(open_.begin(), open_, found);
  } else {
    auto shard =
        std::make_shared<const Shard>(static_cast<int64_t>(index), shards_.at(index), tensors_, map_, read_);
    open_.emplace_front(index, std::move(shard));
    if (open_.size() > kOpen) open_.pop_back();
  }
  return open_.front().second;
}

}  // namespace attr_engine
