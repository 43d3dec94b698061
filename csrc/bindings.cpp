// Binds crc32c.h and gather.h to Python as attr_engine._native. Converts arguments, releases the GIL, turns
// GatherError into Python exceptions. attr_engine/latents/native.py holds the same in Python, with the same
// messages; change both together.

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "crc32c.h"
#include "gather.h"

namespace py = pybind11;

namespace attr_engine {
namespace {

PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> checksum_error;

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

void PyGather(const py::object& fd, const py::object& data_offset, const py::object& row_bytes,
              const py::object& starts, const py::object& lengths, const py::object& out,
              const py::object& frames, const py::object& pad_row, const py::object& checksums) {
  GatherRequest request;
  request.fd = static_cast<int>(Integer("fd", fd, INT_MIN, INT_MAX));
  request.data_offset = Integer("data_offset", data_offset, INT64_MIN, INT64_MAX);
  request.row_bytes = Integer("row_bytes", row_bytes, INT64_MIN, INT64_MAX);
  request.frames = Integer("frames", frames, INT64_MIN, INT64_MAX);
  request.starts = Vector<int64_t>("starts", starts, "int64", "lq");
  request.lengths = Vector<int64_t>("lengths", lengths, "int64", "lq");

  const Buffer out_buffer("out", out);
  if (out_buffer.readonly()) throw py::value_error("out is read-only: pass a writable buffer");
  request.out = out_buffer.data();
  request.out_bytes = out_buffer.size();

  std::optional<Buffer> pad_buffer;
  if (!pad_row.is_none()) {
    pad_buffer.emplace("pad_row", pad_row);
    if (static_cast<int64_t>(pad_buffer->size()) != request.row_bytes) {
      throw py::value_error("pad_row has " + std::to_string(pad_buffer->size()) + " bytes but row_bytes is " +
                            std::to_string(request.row_bytes));
    }
    request.pad_row = pad_buffer->data();
  }
  if (!checksums.is_none()) request.checksums = Vector<uint32_t>("checksums", checksums, "uint32", "IL");

  const py::gil_scoped_release unlocked;
  Gather(request);
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 gives the signature
void Translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const GatherError& error) {
    switch (error.kind()) {
      case GatherError::Kind::kArgument:
        PyErr_SetString(PyExc_ValueError, error.what());
        break;
      case GatherError::Kind::kChecksum:
        PyErr_SetString(checksum_error.get_stored().ptr(), error.what());
        break;
      case GatherError::Kind::kRead: {
        // Built from one argument, so that str() is the sentence itself, not "[Errno 5] ...".
        const py::object exception = py::handle(PyExc_OSError)(error.what());
        if (error.error_number() != 0) exception.attr("errno") = error.error_number();
        PyErr_SetObject(PyExc_OSError, exception.ptr());
        break;
      }
    }
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ part of attr_engine.latents; use it through attr_engine.latents.native.";
  checksum_error.call_once_and_store_result([&module] {
    return py::object(py::exception<GatherError>(module, "ChecksumError", PyExc_ValueError));
  });
  py::register_local_exception_translator(&Translate);
  module.def("crc32c", &PyCrc32c, py::arg("data"), py::arg("value") = 0);
  module.def("crc32c_implementation", &Crc32cImplementation);
  module.def("gather", &PyGather, py::arg("fd"), py::arg("data_offset"), py::arg("row_bytes"),
             py::arg("starts"), py::arg("lengths"), py::arg("out"), py::arg("frames"),
             py::arg("pad_row") = py::none(), py::arg("checksums") = py::none());
}

}  // namespace attr_engine
