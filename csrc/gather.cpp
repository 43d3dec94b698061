#include "gather.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "crc32c.h"
#include "header.h"

namespace attr_engine {
namespace {

using Kind = ReadError::Kind;

// What is checked is read in pieces of this size, so that the check finds its bytes in the L2 cache.
constexpr int64_t kPiece = int64_t{256} * 1024;
// What is cast passes through a buffer of this size: a whole track in one read was a quarter faster.
constexpr int64_t kCastPiece = int64_t{512} * 1024;

std::string Text(int64_t number) { return std::to_string(number); }

std::string Hex(uint32_t number) {
  char text[11];
  (void)std::snprintf(text, sizeof text, "0x%08x", number);
  return text;
}

template <typename List>
auto At(const List& list, int64_t i) {
  return list[static_cast<size_t>(i)];
}

}  // namespace

int64_t RowIn(const TensorSpec& tensor) { return tensor.row_items * ItemBytes(tensor.dtype); }

int64_t RowOut(const TensorSpec& tensor, const Field& field) {
  return field.to ? tensor.row_items * static_cast<int64_t>(SizeOf(*field.to)) : RowIn(tensor);
}

void Refuse(const std::string& sentence, int64_t track) {
  throw ReadError(Kind::kArgument, ReadError::kNone, track, sentence);
}

// Tracks that are read together, and what is known of them so far.
struct Gatherer::Group {
  const Field& field;
  const TensorSpec& tensor;
  int64_t first;
  int64_t last;  // one past the last track
  int64_t rows;  // of all of them
  int64_t row;   // bytes of a row in the file
  int64_t item;  // bytes of an item in the file
  bool casts;
  uint32_t crc = 0;  // of a single track, so far
  std::optional<ReadError> nonfinite;

  bool single() const { return last == first + 1; }

  // Notes the first number that is not finite; that the bytes are damaged would be the better reason.
  void Note(int64_t shard, int64_t done, size_t index, const std::string& what) {
    const int64_t in_group = (done + static_cast<int64_t>(index) * item) / row;
    const int64_t each = single() ? rows + 1 : rows / (last - first);
    nonfinite.emplace(Kind::kNonFinite, shard, first + in_group / each, what + Text(in_group % each));
  }
};

void Gatherer::Enter(int64_t track) {
  if (open_ == At(plan_.shards, track)) return;
  open_ = ReadError::kNone;
  shard_ = shards_.Open(static_cast<size_t>(At(plan_.shards, track)));
  open_ = At(plan_.shards, track);
}

Gatherer::Group Gatherer::Begin(const Field& field, int64_t frames, int64_t track, int64_t last) const {
  const TensorSpec& tensor = shards_.tensors()[field.tensor];
  const int64_t start = At(field.starts, track);
  const int64_t held = shard_->rows(field.tensor);
  Group group{field,
              tensor,
              track,
              track + 1,
              At(field.rows, track),
              RowIn(tensor),
              ItemBytes(tensor.dtype),
              field.to && FloatType(tensor.dtype) != field.to,
              0,
              std::nullopt};
  if (start > held || group.rows > held - start) {
    throw ReadError(Kind::kMismatch, open_, track,
                    Text(group.rows) + " rows from row " + Text(start) + " lie outside its '" + tensor.name +
                        "', which has " + Text(held));
  }
  const auto fits = [&](int64_t next) {
    return frames > 0 && group.rows == (next - track) * frames && At(field.rows, next) == frames &&
           At(plan_.shards, next) == open_ && At(field.starts, next) == start + group.rows &&
           frames <= held - start - group.rows && (group.rows + frames) * group.row <= kPiece;
  };
  for (; group.last < last && fits(group.last); ++group.last) group.rows += frames;
  return group;
}

// Checks bytes that came from the file, `done` bytes into the group.
void Gatherer::CheckPiece(Group& group, const uint8_t* from, int64_t done, size_t size) const {
  const Field& field = group.field;
  if (!field.checksums.empty() && group.single()) {
    group.crc = Crc32c(from, size, group.crc);
  } else if (!field.checksums.empty()) {
    const size_t each =
        size / static_cast<size_t>(group.last - group.first);  // a group of several is one piece
    for (int64_t i = group.first; i < group.last; ++i, from += each) {
      if (Crc32c(from, each) != At(field.checksums, i)) {
        throw ReadError(Kind::kChecksum, open_, i,
                        "it is damaged");  // read again on its own, for the sentence
      }
    }
    from -= size;
  }
  if (field.refuse_nonfinite && !group.nonfinite) {
    const size_t items = size / static_cast<size_t>(group.item);
    const size_t first = FirstNonFinite(from, *FloatType(group.tensor.dtype), items);
    if (first < items) {
      group.Note(open_, done, first, "its '" + group.tensor.name + "' holds NaN or infinity, first in row ");
    }
  }
}

void Gatherer::CastPiece(Group& group, uint8_t* to, const uint8_t* from, int64_t done, size_t size) const {
  const DType target = *group.field.to;
  const size_t items = size / static_cast<size_t>(group.item);
  Cast(to, target, from, *FloatType(group.tensor.dtype), items);
  // bfloat16 reaches as far as float32, float16 does not.
  const bool narrows = SizeOf(target) < static_cast<size_t>(group.item) || target == DType::kF16;
  if (!group.field.refuse_nonfinite || !narrows || group.nonfinite) return;
  const size_t first = FirstNonFinite(to, target, items);
  if (first < items) {
    group.Note(open_, done, first,
               "its '" + group.tensor.name + "' does not fit into the dtype asked for, first in row ");
  }
}

int64_t Gatherer::Read(const Field& field, int64_t frames, int64_t track, int64_t last, uint8_t* out) {
  Enter(track);
  Group group = Begin(field, frames, track, last);
  const bool checks = !field.checksums.empty() || field.refuse_nonfinite;
  const int64_t size = group.rows * group.row;
  const int64_t most = group.casts ? kCastPiece : (checks ? kPiece : std::max<int64_t>(size, 1));
  if (group.casts && bounce_.empty()) bounce_.resize(static_cast<size_t>(kCastPiece));
  for (int64_t done = 0; done < size;) {
    const auto piece = static_cast<size_t>(std::min(most, size - done));
    uint8_t* const from = group.casts ? bounce_.data() : out + done;
    shard_->Read(track, field.tensor, At(field.starts, track) * group.row + done, from, piece);
    if (checks) CheckPiece(group, from, done, piece);
    if (group.casts) {
      CastPiece(group, out + done / group.item * static_cast<int64_t>(SizeOf(*field.to)), from, done, piece);
    }
    done += static_cast<int64_t>(piece);
  }
  if (group.single() && !field.checksums.empty() && group.crc != At(field.checksums, track)) {
    throw ReadError(Kind::kChecksum, open_, track,
                    "the " + Text(size) + " bytes of its '" + group.tensor.name + "' have the CRC-32C " +
                        Hex(group.crc) + " but " + Hex(At(field.checksums, track)) +
                        " was recorded: the file is damaged");
  }
  if (group.nonfinite) throw ReadError(*group.nonfinite);
  return group.last;
}

}  // namespace attr_engine
