// Binds csrc to Python as attr_engine._native. Converts arguments, releases the GIL, keeps Python's memory
// alive while C++ uses it. attr_engine/latents/pyreader.py is the same in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "convert.h"
#include "crc32c.h"
#include "header.h"
#include "shards.h"
#include "stream.h"

namespace py = pybind11;

namespace attr_engine {
namespace {

// Holds an object's buffer for the length of a call: while it lives the memory can neither move nor be freed.
class Buffer {
 public:
  Buffer(const char* name, py::handle object) {
    if (!PyObject_CheckBuffer(object.ptr())) {
      const auto type = py::str(py::type::handle_of(object).attr("__name__")).cast<std::string>();
      throw py::type_error(std::string(name) + " must be a buffer, not " + type);
    }
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FULL_RO) != 0) throw py::error_already_set();
    if (!PyBuffer_IsContiguous(&view_, 'C')) {
      PyBuffer_Release(&view_);
      throw py::value_error(std::string(name) + " must be C-contiguous");
    }
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }
  bool readonly() const { return view_.readonly != 0; }

  // Whether the items are plain integers of `size` bytes in the byte order of this machine, in one dimension,
  // with one of the struct-module letters `codes`.
  bool IsVector(size_t size, const char* codes) const {
    const char* format = view_.format == nullptr ? "B" : view_.format;
    if (*format == '@' || *format == '=' || *format == '<') ++format;
    return view_.ndim == 1 && view_.itemsize == static_cast<Py_ssize_t>(size) && format[0] != '\0' &&
           format[1] == '\0' && std::strchr(codes, format[0]) != nullptr;
  }

 private:
  Py_buffer view_{};
};

// Copies a one-dimensional buffer of integers: the copy cannot change while the GIL is released, and an
// unaligned buffer is no trouble.
template <typename T>
std::vector<T> Vector(const char* name, py::handle object, const char* type, const char* codes) {
  const Buffer buffer(name, object);
  if (!buffer.IsVector(sizeof(T), codes)) {
    throw py::value_error(std::string(name) + " must be a one-dimensional buffer of " + type);
  }
  std::vector<T> copy(buffer.size() / sizeof(T));
  if (!copy.empty()) std::memcpy(copy.data(), buffer.data(), buffer.size());
  return copy;
}

// Converts as operator.index does; a number outside [low, high] is a ValueError.
int64_t Integer(const char* name, py::handle object, int64_t low, int64_t high) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || number < low || number > high) {
    throw py::value_error(std::string(name) + " must be between " + std::to_string(low) + " and " +
                          std::to_string(high) + ", not " + py::str(index).cast<std::string>());
  }
  return number;
}

uint32_t PyCrc32c(const py::object& data, const py::object& value) {
  const Buffer buffer("data", data);
  const auto start = static_cast<uint32_t>(Integer("value", value, 0, UINT32_MAX));
  const py::gil_scoped_release unlocked;
  return Crc32c(buffer.data(), buffer.size(), start);
}

// The bytes of a dtype by its safetensors name.
DType Float(const std::string& name) {
  const auto dtype = FloatType(name);
  if (!dtype) throw py::value_error("'" + name + "' is not one of F16, BF16, F32, F64");
  return *dtype;
}

void PyCast(const py::object& out, const std::string& to, const py::object& data, const std::string& from) {
  const Buffer target("out", out);
  const Buffer source("data", data);
  const DType to_type = Float(to);
  const DType from_type = Float(from);
  if (target.readonly()) throw py::value_error("out is read-only: pass a writable buffer");
  if (source.size() % SizeOf(from_type) != 0 ||
      source.size() / SizeOf(from_type) * SizeOf(to_type) != target.size()) {
    throw py::value_error("out does not have the size of the cast data");
  }
  const py::gil_scoped_release unlocked;
  Cast(target.data(), to_type, source.data(), from_type, source.size() / SizeOf(from_type));
}

void PyCopyNonTemporal(const py::object& out, const py::object& data) {
  const Buffer target("out", out);
  const Buffer source("data", data);
  if (target.readonly()) throw py::value_error("out is read-only: pass a writable buffer");
  if (source.size() != target.size()) throw py::value_error("out does not have the size of the data");
  const py::gil_scoped_release unlocked;
  CopyNonTemporal(target.data(), source.data(), source.size());
}

size_t PyFirstNonFinite(const py::object& data, const std::string& dtype) {
  const Buffer source("data", data);
  const DType type = Float(dtype);
  const py::gil_scoped_release unlocked;
  return FirstNonFinite(source.data(), type, source.size() / SizeOf(type));
}

py::list PyParseHeader(const py::object& text, int64_t payload) {
  const Buffer source("text", text);
  py::list entries;
  for (const TensorEntry& entry :
       ParseHeader(reinterpret_cast<const char*>(source.data()), source.size(), payload)) {
    entries.append(py::make_tuple(entry.name, entry.dtype, entry.shape, entry.begin, entry.end));
  }
  return entries;
}

const char* KindName(ReadError::Kind kind) {
  switch (kind) {
    case ReadError::Kind::kArgument:
      return "argument";
    case ReadError::Kind::kMissing:
      return "missing";
    case ReadError::Kind::kUnreadable:
      return "unreadable";
    case ReadError::Kind::kTruncated:
      return "truncated";
    case ReadError::Kind::kHeader:
      return "header";
    case ReadError::Kind::kMismatch:
      return "mismatch";
    case ReadError::Kind::kChecksum:
      return "checksum";
    case ReadError::Kind::kNonFinite:
      return "nonfinite";
    case ReadError::Kind::kStarved:
      return "starved";
    default:
      return "closed";
  }
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 gives the signature
void Translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const ReadError& error) {
    const auto type = py::module_::import("attr_engine.latents.errors").attr("ReadError");
    const py::object value = type(KindName(error.kind()), error.shard(), error.track(), error.what());
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

class PyShards {
 public:
  PyShards(const std::vector<std::pair<std::string, int64_t>>& shards,
           const std::vector<std::tuple<std::string, std::string, int64_t>>& tensors, bool map) {
    std::vector<ShardSpec> files;
    for (const auto& [path, bytes] : shards) files.push_back({path, bytes});
    std::vector<TensorSpec> specs;
    for (const auto& [name, dtype, row_items] : tensors) specs.push_back({name, dtype, row_items});
    set_ = std::make_shared<ShardSet>(std::move(files), std::move(specs), map);
  }
  std::shared_ptr<ShardSet> set() const { return set_; }

 private:
  std::shared_ptr<ShardSet> set_;
};

// The Ring and the Python memory that it borrows.
struct PyRing {
  PyRing(const py::object& memory, size_t slot_bytes) : buffer("ring", memory) {
    if (buffer.readonly()) throw py::value_error("ring is read-only: pass a writable buffer");
    ring = std::make_shared<Ring>(buffer.data(), buffer.size(), slot_bytes);
  }
  Buffer buffer;
  std::shared_ptr<Ring> ring;
};

// One batch in the hands of Python: a buffer that gives its slot back when the last tensor that shares it is
// gone.
class PySlot {
 public:
  PySlot(std::shared_ptr<PyRing> ring, size_t index, int64_t batch)
      : ring_(std::move(ring)), index_(index), batch_(batch), pid_(::getpid()) {}
  ~PySlot() {
    if (::getpid() != pid_) return;  // after a fork the lock may be held by a thread that is not there
    ring_->ring->Release(index_, Touched());
  }
  PySlot(const PySlot&) = delete;
  PySlot& operator=(const PySlot&) = delete;

  // `tensor` shares the version counter of the tensors over this slot, and not their memory: if it has moved
  // on when the slot is given back, somebody has changed them in place.
  void Guard(py::object tensor) {
    version_ = tensor.attr("_version").cast<int64_t>();
    guard_ = std::move(tensor);
  }
  py::buffer_info Info() const {
    return {ring_->ring->slot(index_), static_cast<py::ssize_t>(ring_->ring->slot_bytes()), false};
  }
  int64_t batch() const { return batch_; }

 private:
  bool Touched() const {
    if (!guard_) return true;
    PyObject* version = PyObject_GetAttrString(guard_.ptr(), "_version");
    const int64_t now = version == nullptr ? -1 : PyLong_AsLongLong(version);
    Py_XDECREF(version);
    PyErr_Clear();
    return now != version_;
  }

  std::shared_ptr<PyRing> ring_;
  size_t index_;
  int64_t batch_;
  pid_t pid_;
  py::object guard_;
  int64_t version_ = -1;
};

Field PyField(const py::dict& values) {
  Field field;
  field.tensor = values["tensor"].cast<size_t>();
  if (!values["to"].is_none()) field.to = Float(values["to"].cast<std::string>());
  field.starts = Vector<int64_t>("starts", values["starts"], "int64", "lq");
  field.rows = Vector<int64_t>("rows", values["rows"], "int64", "lq");
  if (!values["checksums"].is_none()) {
    field.checksums = Vector<uint32_t>("checksums", values["checksums"], "uint32", "IL");
  }
  field.frames = Vector<int64_t>("frames", values["frames"], "int64", "lq");
  if (!values["pad_row"].is_none()) {
    const Buffer row("pad_row", values["pad_row"]);
    field.pad_row.assign(row.data(), row.data() + row.size());
  }
  field.refuse_nonfinite = values["refuse_nonfinite"].cast<bool>();
  field.slot_offset = values["slot_offset"].cast<size_t>();
  return field;
}

class PyStream {
 public:
  PyStream(const PyShards& shards, const py::object& shard_of, const py::object& ends, const py::list& fields,
           const py::object& memory, size_t slot_bytes, size_t threads, int64_t first)
      : ring_(std::make_shared<PyRing>(memory, slot_bytes)), pid_(::getpid()) {
    Plan plan;
    plan.shards = Vector<int32_t>("shard_of", shard_of, "int32", "i");
    plan.ends = Vector<int64_t>("ends", ends, "int64", "lq");
    for (const py::handle field : fields) plan.fields.push_back(PyField(field.cast<py::dict>()));
    const py::gil_scoped_release unlocked;
    stream_ = std::make_unique<Stream>(shards.set(), std::move(plan), ring_->ring, threads, first);
  }
  ~PyStream() {  // NOLINT(bugprone-exception-escape): nothing throws where the GIL is held
    if (::getpid() != pid_) {
      (void)stream_.release();  // its threads are not in this process; their locks may be held for ever
      return;
    }
    const py::gil_scoped_release unlocked;
    stream_.reset();
  }
  PyStream(const PyStream&) = delete;
  PyStream& operator=(const PyStream&) = delete;

  // The next batch, or none at the end. `patience`: seconds to wait where every buffer is held.
  std::shared_ptr<PySlot> Next(double patience) {
    constexpr int64_t kTick = 100;  // milliseconds between looks at signals
    double starved = 0;
    for (;;) {
      if (::getpid() != pid_) {
        throw ReadError(ReadError::Kind::kClosed, ReadError::kNone, ReadError::kNone,
                        "the stream was opened before this process was forked: open it again here");
      }
      Stream::Result result{};
      {
        const py::gil_scoped_release unlocked;
        result = stream_->Next(kTick);
      }
      if (result.state == Stream::State::kEnd) return nullptr;
      if (result.state == Stream::State::kBatch) {
        return std::make_shared<PySlot>(ring_, result.slot, result.batch);
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      starved = result.state == Stream::State::kStarved ? starved + 0.001 * kTick : 0;
      if (starved > patience) {
        throw ReadError(ReadError::Kind::kStarved, ReadError::kNone, ReadError::kNone,
                        "all " + std::to_string(ring_->ring->slots()) +
                            " buffers are held by batches that are still "
                            "alive: drop or copy them, or ask for more buffers");
      }
    }
  }

  void Close() {
    if (::getpid() != pid_) return;
    const py::gil_scoped_release unlocked;
    stream_->Close();
  }

 private:
  std::shared_ptr<PyRing> ring_;
  pid_t pid_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ part of attr_engine.latents; use it through attr_engine.latents.native.";
  py::register_local_exception_translator(&Translate);
  module.def("crc32c", &PyCrc32c, py::arg("data"), py::arg("value") = 0);
  module.def("crc32c_implementation", &Crc32cImplementation);
  module.def("cast", &PyCast, py::arg("out"), py::arg("to"), py::arg("data"), py::arg("dtype"));
  module.def("copy_nontemporal", &PyCopyNonTemporal, py::arg("out"), py::arg("data"));
  module.def("first_nonfinite", &PyFirstNonFinite, py::arg("data"), py::arg("dtype"));
  module.def("parse_header", &PyParseHeader, py::arg("text"), py::arg("payload"));
  py::class_<PyShards>(module, "Shards")
      .def(py::init<const std::vector<std::pair<std::string, int64_t>>&,
                    const std::vector<std::tuple<std::string, std::string, int64_t>>&, bool>(),
           py::arg("shards"), py::arg("tensors"), py::arg("map"));
  py::class_<PySlot, std::shared_ptr<PySlot>>(module, "Slot", py::buffer_protocol())
      .def_buffer(&PySlot::Info)
      .def("guard", &PySlot::Guard)
      .def_property_readonly("batch", &PySlot::batch);
  py::class_<PyStream>(module, "Stream")
      .def(py::init<const PyShards&, const py::object&, const py::object&, const py::list&, const py::object&,
                    size_t, size_t, int64_t>(),
           py::arg("shards"), py::arg("shard_of"), py::arg("ends"), py::arg("fields"), py::arg("ring"),
           py::arg("slot_bytes"), py::arg("threads"), py::arg("first"))
      .def("next", &PyStream::Next, py::arg("patience"))
      .def("close", &PyStream::Close);
}

}  // namespace attr_engine
